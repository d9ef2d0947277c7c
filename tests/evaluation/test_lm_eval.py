"""lm-eval through the serving cache: both commands, lm-eval's own class where nothing is cut, and mistakes."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml

import kvtrain
from kvtrain.cli import main
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.inference.load import open_model
from tests.evaluation.lm_eval_tasks import NAMES, QUESTIONS, TEXTS, write_tasks
from tests.hosts import make_host

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.roads

METHOD = "H2O(budget=24, recent=8)"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture(scope="module")
def host():
    return kvtrain.load("kvtrain:tiny", dtype=torch.float32).eval()


@pytest.fixture
def few_tasks(monkeypatch):
    """Without lm-eval's thousands, which it takes many seconds to list."""
    from lm_eval.tasks import TaskManager

    before = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: before(self, **{**given, "include_defaults": False})
    )


def served(model, tokenizer, **settings):
    from kvtrain.evaluation.lm_eval.model import ServedLM

    return ServedLM(model, tokenizer, **settings)


def requests(kind, *arguments, task="t"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, metadata=(task, 0, 1)) for given in arguments]


def test_both_commands_give_the_same_numbers(files, tmp_path, capsys, caplog):
    from kvtrain.evaluation.lm_eval.__main__ import main as lm_eval_main

    tasks = ",".join(f"lm-eval:{files[name]}" for name in NAMES)
    own = ["eval", "kvtrain:tiny", "--tasks", tasks, "--method", METHOD, "--decode", "--json", str(tmp_path / "o.json")]
    assert main(own) == 0
    caplog.clear()  # what the command said, where a level that another test set lets it through
    rows = {row["task"]: row for row in json.loads((tmp_path / "o.json").read_text())}
    model = ["--model_args", "pretrained=kvtrain:tiny", f"method={METHOD}", "decode=True"]
    theirs = [*model, "--tasks", *(files[name] for name in NAMES), "--output_path", str(tmp_path / "out")]
    with caplog.at_level(logging.INFO, "kvtrain"):
        assert lm_eval_main(theirs) == 0
    assert [line.split(":")[0] for line in caplog.messages if "tokens kept in the mean" in line] == [
        "local_choice",
        "local_rolling",
        "local_generation",
    ]
    (written,) = (tmp_path / "out").rglob("*.json")
    found = json.loads(written.read_text())
    assert found["config"]["method"] == rows["lm-eval:local_choice"]["method"] == "H2O(recent=8, budget=24)"
    metrics = {"choice": ("acc", "acc_norm"), "rolling": ("bits_per_byte",), "generation": ("exact_match",)}
    for name in NAMES:
        row, result = rows[f"lm-eval:local_{name}"], found["results"][f"local_{name}"]
        for metric in metrics[name]:
            assert row[metric] == pytest.approx(result[f"{metric},none"], rel=1e-6)
        shown = ("word_perplexity", "lower") if name == "rolling" else (metrics[name][0], "higher")
        assert (row["metric"], row["better"]) == shown
        held = found["config"]["kv_cache"][f"local_{name}"]
        assert row["kept_tokens"] == pytest.approx(held["kept_tokens"])
        assert row["kv_bytes_mean"] == pytest.approx(held["kv_bytes_mean"], rel=0.02)  # other rows side by side
    assert rows["lm-eval:local_rolling"]["compression"] > 3
    assert (rows["lm-eval:local_choice"]["documents"], rows["lm-eval:local_choice"]["trained"]) == (4, False)
    capsys.readouterr()


def test_texts_that_fit_into_a_window_cost_what_perplexity_says(files):
    corpus = str(Path(files["rolling"]).parent / "corpus.jsonl")
    rows = run_tasks(
        "kvtrain:tiny",
        [f"lm-eval:{files['rolling']}", "perplexity"],
        dtype="float32",
        corpus=corpus,
        method=kvtrain.DMC(init_bias=0.0),
    )
    assert rows[0]["bits_per_byte"] == pytest.approx(rows[1]["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_of_a_model_that_keeps_all_it_says_what_lm_evals_own_class_says(host, tokenizer, batch):
    from lm_eval.models.huggingface import HFLM

    plain = HFLM(pretrained=host, tokenizer=tokenizer, batch_size=batch, max_length=48, device="cpu")
    model = kvtrain.retrofit(kvtrain.load("kvtrain:tiny", dtype=torch.float32), kvtrain.Full()).eval()
    ours = served(model, tokenizer, batch_size=batch, max_length=48, add_bos_token=False)
    pairs = [("import", " os"), ("import", " sys\nfrom"), ("", "x = 1"), (TEXTS[2], "return"), ("a ", "b c")]
    expected = plain.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [(text,) for text in TEXTS]  # in several windows of 48 tokens
    expected = plain.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)
    settings = [{"until": ["\n"], "max_gen_toks": 8}, {"until": ["zz", " ="], "max_gen_toks": 12, "do_sample": False}]
    asked = [(question["text"], setting) for question in QUESTIONS for setting in settings]
    expected = plain.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", *asked), disable_tqdm=True) == expected


def test_bytes_are_a_task_s_own(host, tokenizer):
    ours = served(kvtrain.retrofit(host, kvtrain.StreamingLLM(budget=16, recent=12, page_size=4)), tokenizer)
    long = requests("loglikelihood", (TEXTS[0], " os"), task="long")
    ours.loglikelihood([*long, *requests("loglikelihood", ("a", " b"), task="short")], disable_tqdm=True)
    held = ours.get_model_info()["kv_cache"]
    assert set(held) == {"long", "short"}
    assert held["short"]["kept_tokens"] == 2 and 16 <= held["long"]["kept_tokens"] < 20
    assert held["short"]["kv_bytes_end"] < held["long"]["kv_bytes_end"] < held["long"]["kv_bytes_peak"]


def test_texts_begin_as_they_do_when_the_model_serves(host, tokenizer):
    model = kvtrain.retrofit(host, kvtrain.Full())
    ours = served(model, tokenizer)
    start = tokenizer.bos_token_id
    assert ours.tok_encode("x = 1")[0] == start != ours.tok_encode("x = 1", add_special_tokens=False)[0]
    assert ours.tok_encode(tokenizer.bos_token + "x") == ours.tok_encode("x")
    assert served(model, tokenizer, add_bos_token=False).tok_encode("x")[0] != start


def test_chats_are_what_the_template_says(host, files):
    tokenizer = load_tokenizer("kvtrain:tiny")
    ours = served(kvtrain.retrofit(host, kvtrain.Full()), tokenizer)
    chat = [{"role": "user", "content": "import"}]
    with pytest.raises(ValueError, match="no chat template"):
        ours.apply_chat_template(chat)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert ours.apply_chat_template(chat) == "<user>import\n<assistant>"
    begun = [*chat, {"role": "assistant", "content": " os"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == "<user>import\n<assistant> os"
    assert ours.chat_template(True) == tokenizer.chat_template
    with pytest.raises(ValueError, match=r"refuses a chat of system, user: no system"):
        ours.apply_chat_template([{"role": "system", "content": "s"}, *chat])

    from kvtrain.evaluation.lm_eval.tasks import LmEvalTask

    settings = {"limit": 2, "decode": False, "num_fewshot": None}
    rows = [
        LmEvalTask(files["choice"]).measure(ours.model, tokenizer, chat_template=chat_template, **settings)[0]
        for chat_template in (False, True)
    ]
    assert rows[0]["documents"] == rows[1]["documents"] == 2
    assert rows[1]["kept_tokens"] > rows[0]["kept_tokens"] + 4  # <user> and <assistant>


def test_a_group_has_a_row_for_each_task_and_one_for_all(files, tmp_path, few_tasks):
    path = tmp_path / "both.yaml"
    parts = [yaml.safe_load(Path(files[name]).read_text()) for name in ("choice", "generation")]
    parts[1] |= {"task": "second", "output_type": "multiple_choice"} | {
        k: v for k, v in parts[0].items() if k != "task"
    }
    path.write_text(yaml.safe_dump({"group": "both", "task": parts, "aggregate_metric_list": [{"metric": "acc"}]}))
    rows = {row["task"]: row for row in run_tasks("kvtrain:tiny", [f"lm-eval:{path}"], limit=2)}
    assert set(rows) == {"lm-eval:both", "lm-eval:both::local_choice", "lm-eval:both::second"}
    assert rows["lm-eval:both"]["acc"] == rows["lm-eval:both::second"]["acc"] == 0.5
    assert "kv_bytes_end" in rows["lm-eval:both::second"]


MISTAKES = [
    ("eval kvtrain:tiny --tasks lm-eval:hellaswagg", "unknown lm-eval task 'hellaswagg'. Did you mean 'hellaswag'?"),
    ("eval kvtrain:tiny --tasks lm-eval:nope.yaml", "lm-eval:nope.yaml: no such file"),
    ("eval kvtrain:tiny --tasks lm-eval:{folder}/bad.yaml", "bad.yaml cannot be read"),
    ("eval kvtrain:tiny --tasks lm-eval:{folder}/nodata.yaml", "nodata.yaml cannot be read"),
    ("eval kvtrain:tiny --tasks lm-eval:{choice} --num-fewshot -1", "num_fewshot must be at least 0, not -1"),
    ("eval kvtrain:tiny --tasks lm-eval:{choice} --apply-chat-template", "the tokenizer has no chat template"),
    ("eval kvtrain:tiny --tasks lm-eval:{rolling} --method H2O()", "this method cuts a prompt when it ends"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_is_said_in_a_line(line, words, files, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("task: [\n")
    nodata = Path(files["choice"]).read_text().replace("choice.jsonl", "gone.jsonl")
    (tmp_path / "nodata.yaml").write_text(nodata)
    assert main([part.format(folder=tmp_path, **files) for part in line.split()]) == 2
    said = [row for row in capsys.readouterr().err.splitlines() if row.startswith("kvtrain: error:")]
    assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": "auto"}, "batch_size must be a number from 1 on, not 'auto'"),
        ({"max_length": 1}, "max_length must be at least 2, not 1"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1, not 0"),
        ({"tokenizer": None}, "comes with its tokenizer"),
        ({"method": "H2O()"}, "has its method; leave out method="),
        pytest.param(
            {"device": "cuda:0"},
            "no device .cuda:0. here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_settings_are_checked(host, tokenizer, settings, words):
    with pytest.raises(ValueError, match=words):
        served(host, **{"tokenizer": tokenizer, **settings})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("pretraned=kvtrain:tiny", "unknown model argument 'pretraned'. Did you mean 'pretrained'?"),
        ("decode=True", "--model_args pretrained=MODEL is missing"),
        ("pretrained=nope", "no model at 'nope'"),
        ("pretrained=kvtrain:tiny,method=H20()", "unknown method 'H20'. Did you mean 'H2O'?"),
        ("pretrained=kvtrain:tiny,batch_size=auto", "batch_size must be a number"),
    ],
)
def test_lm_evals_command_says_what_is_wrong_with_a_model_in_a_line(given, words, files, few_tasks, capsys):
    from kvtrain.evaluation.lm_eval.__main__ import main as lm_eval_main

    assert lm_eval_main(["--model_args", given, "--tasks", files["choice"]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and words in said[0]


def test_python_hands_arguments_over_in_a_string_too():
    from lm_eval.api.registry import get_model

    from kvtrain.evaluation.lm_eval import register

    register()
    given = "pretrained=kvtrain:tiny,method=H2O(budget=24, recent=8),max_length=64"
    ours = get_model("kvtrain").create_from_arg_string(given, {"batch_size": 3, "device": None})
    assert (ours.model.config.method.budget, ours.max_length, ours.batch_size) == (24, 64, 3)


def test_what_cannot_be_answered_is_refused(host, tokenizer):
    ours = served(kvtrain.retrofit(host, kvtrain.Full()), tokenizer, max_length=16)
    for settings, words in (({"num_beams": 2}, "num_beams must be 1"), ({"max_gen_toks": 16}, "leave no room in 16")):
        with pytest.raises(ValueError, match=words):
            ours.generate_until(requests("generate_until", ("x", {"until": [], **settings})), disable_tqdm=True)
    with pytest.raises(ValueError, match="cannot be scored in rows of 16"):
        ours.loglikelihood(requests("loglikelihood", ("x", " y" * 30)), disable_tqdm=True)


def test_contexts_that_are_too_long_lose_their_beginnings(tokenizer):
    host = make_host("llama", vocab_size=4096)
    ours = served(kvtrain.retrofit(host, kvtrain.Full()), tokenizer, max_length=24)
    ((long, _),) = ours.loglikelihood(requests("loglikelihood", (TEXTS[0].strip(), "\n")), disable_tqdm=True)
    ids = ours.tok_encode(TEXTS[0])[-25:]
    with torch.no_grad():
        logits = ours.model(torch.tensor([ids[:-1]]), use_cache=False).logits[0, -1]
    assert long == pytest.approx(torch.log_softmax(logits, -1)[ids[-1]].item(), abs=1e-9)


def test_a_folder_without_a_method_is_measured_as_it_is(host, tokenizer, files, tmp_path):
    host.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    (row,) = run_tasks(str(tmp_path / "plain"), [f"lm-eval:{files['choice']}"])
    (same,) = run_tasks("kvtrain:tiny", [f"lm-eval:{files['choice']}"], dtype="float32")
    assert row["method"] == "Full()" and row["acc_norm"] == same["acc_norm"]
    assert math.isclose(row["kv_share_mean"], 1, rel_tol=1e-2)
    assert open_model(tmp_path / "plain")[0].dtype == torch.float32
