"""The road of chats: fit, SIGKILL, resume to the same bits, export with the template, and answer."""

import json

import pytest

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.run_folder import step_files
from tests.integration.test_road import Road, assert_same_run, has_saved, save_base
from tests.processes import KVTRAIN, Forked, Fresh, kill_when, run

ROAD = Road("chat", {"chats": 8}, (3,))
ASK = """
import json, sys, kvtrain
from transformers import AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), kvtrain.load(sys.argv[1])
ask = [{"role": "user", "content": "What is 7 + 1?"}]
text = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(json.dumps([text, model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] - ids["input_ids"].shape[1]]))
"""


def fit_arguments(base, folder, chats, resume=False):
    settings = {
        "trainer.default_root_dir": folder,
        "trainer.max_steps": ROAD.steps,
        "trainer.precision": "32-true",
        "trainer.checkpoint_every": 3,
        "trainer.val_check_interval": 4,
        "trainer.log_every_n_steps": 1,
        "model.init_args.base": base,
        "model.init_args.phases": '[{"name": "chats", "steps": 8, "learning_rate": 0.01, "warmup_steps": 0}]',
        "data.init_args.tokenizer": base,
        "data.init_args.chats": chats,
        "data.init_args.cache_dir": folder.parent / "cache",
        "data.init_args.sequence_length": 64,
        "data.init_args.batch_size": 2,
        "data.init_args.validation_rows": 2,
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    resuming = ["--ckpt_path", "last"] if resume else []
    return [str(word) for word in ("fit", "--config", "recipes/tiny/chat.yaml", *options, *resuming)]


@pytest.mark.roads
def test_the_road_of_chats(tmp_path):
    base, whole, killed, log = (tmp_path / name for name in ("base", "whole", "killed", "log"))
    chats = tmp_path / "mine.jsonl"
    chats.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in range(90))
    )
    save_base(ROAD, base)
    run(Forked, KVTRAIN, fit_arguments(base, whole, chats), log)
    kill_when(lambda: has_saved(killed, 3), Forked, KVTRAIN, fit_arguments(base, killed, chats), log)
    assert step_files(killed)
    run(Forked, KVTRAIN, fit_arguments(base, killed, chats, resume=True), log)
    assert_same_run(ROAD, killed, whole)
    exported = str(tmp_path / "exported")
    run(Forked, KVTRAIN, ["export", str(killed), exported], log)
    text, tokens = json.loads(run(Fresh, ASK, [exported], log).splitlines()[-1])
    assert text == "### user\nWhat is 7 + 1?<|endoftext|>\n### assistant\n" and 1 <= tokens <= 4
    asked = ["generate", exported, "--prompt", "What is 7 + 1?", "--apply-chat-template", "--max-new-tokens", "4"]
    answer = run(Forked, KVTRAIN, asked, log)
    assert f"of {len(load_tokenizer(exported)(text)['input_ids']) + tokens - 1} tokens" in answer
    tokenizer = load_tokenizer(exported)
    assert tokenizer.chat_template
    ends = json.loads((tmp_path / "exported" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") in ([ends] if isinstance(ends, int) else ends)
