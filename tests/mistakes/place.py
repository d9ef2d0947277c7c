"""A working directory with everything that a mistaken command line may name, most of it broken."""

import json
import shutil
from pathlib import Path

from kvtrain.assets import ASSETS
from tests.training.small_runs import HOST, recipe_text, write_place

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, str | bytes] = {
    "empty.yaml": "",
    "list.yaml": "[1, 2]",
    "text.yaml": "just words",
    "broken.yaml": "trainer: {max_steps: [1}",
    "tabs.yaml": "trainer:\n\tmax_steps: 1",
    "binary.yaml": b"\x80\x81\x82",
    "latin1.yaml": "a: é".encode("latin-1"),
    "utf16.yaml": "trainer: {}".encode("utf-16"),
    "nul.yaml": "trainer: \x00",
    "tag.yaml": "model: !!python/object/apply:os.system [ls]",
    "cycle.yaml": "model: &a {phases: [*a]}",
    "bomb.yaml": BOMB,
    "deep.yaml": "model: " + "[" * 5000,
    "long.yaml": "#" + "x" * (1 << 20),
    "many.yaml": "\n".join(f"key{number}: 1" for number in range(60_000)),
    "twice.yaml": "trainer:\n  max_steps: 1\n  devices: 1\n  max_steps: 2",
    "sections.yaml": "trainer: {max_steps: 1}\nmodel: {}\ntrainer: {devices: 1}",
    "unfinished.yaml": "model: *nowhere",
    "documents.yaml": "trainer: {}\n---\nmodel: {}",
    "date.yaml": "model: 2020-13-45",
    "nan.yaml": "model: {init_args: {weight_decay: .nan}}",
    "inf.yaml": "trainer:\n  gradient_clip_val: -.inf",
    "itself.yaml": "config: itself.yaml",
    "model.yaml": "model: model.yaml",
    "numbers.yaml": "1: 2",
}
CORPORA: dict[str, str | bytes] = {
    "empty.jsonl": "",
    "blank.txt": " \n",
    "blanks.jsonl": '{"text": ""}\n{"text": ""}\n',
    "body.jsonl": '{"body": "other column"}\n',
    "words.jsonl": "no json at all\n",
    "cut.jsonl": '{"text": "fine"}\n{"text": "cut',
    "null.jsonl": '{"text": null}\n',
    "number.jsonl": '{"text": 5}\n',
    "lists.jsonl": '["text"]\n',
    "half.jsonl": '{"text": "\\ud800"}\n',
    "deep.jsonl": "[" * 100_000,
    "latin1.jsonl": '{"text": "é"}\n'.encode("latin-1"),
    "binary.txt": b"line\n\x80\x81",
    "bad.parquet": b"PAR1",
    "note.docx": b"PK",
    "noextension": "text",
    "bad.jinja": "{% for message in %}",
    "tiny.jsonl": '{"text": "a few words"}\n',
    "hay.jsonl": '{"text": "some words to hide a passkey in, and some more of them"}\n',
}
CHATS: dict[str, str | bytes] = {
    "good.jsonl": "".join(f'{{"prompt": "What is {n}?", "completion": "A number."}}\n' for n in range(40)),
    "column.jsonl": '{"id": 1, "text": "words"}\n',
    "silent.jsonl": '{"messages": [{"role": "user", "content": "hello?"}]}\n',
    "order.jsonl": '\n{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}\n',
    "robot.jsonl": '{"conversations": [{"from": "robot", "value": "beep"}]}\n',
    "number.jsonl": '{"prompt": "a", "completion": 3}\n',
    "cut.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp',
    "empty.jsonl": "",
    "one.json": '{"prompt": "a", "completion": "b"}',
    "plain.txt": "User: a",
    "bad.parquet": b"PAR1",
    "refuses.jinja": "{{ raise_exception('only on Sundays') }}",
    "hides.jinja": "{{ messages[0].content }}",
    "thinks.jinja": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
}
CHAT_RECIPE = """
trainer: {default_root_dir: run, max_steps: 3, accelerator: cpu, devices: 1}
model:
  class_path: RetrofitModule
  init_args: {base: kvtrain:copy, phases: [{name: chats, steps: 3, learning_rate: 0.001}]}
data:
  class_path: ChatDataModule
  init_args:
    tokenizer: kvtrain:copy
    chats: chats/good.jsonl
    chat_template: configs/chat_templates/plain.jinja
    sequence_length: 64
    batch_size: 2
"""
DEEPSPEED = {
    "zero_bad.json": "{",
    "zero_list.json": "[]",
    "zero_stage.json": '{"zero_optimization": {"stage": "x"}}',
    "zero_section.json": '{"zero_optimization": 3}',
    "zero_clip.json": '{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}',
    "zero_nvme.json": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
    "zero_offload.json": '{"zero_optimization": {"stage": 3, "offload_param": 5}}',
    "zero_key.json": '{"zero_optimization": {"stage": 2, "reduce_buket_size": 5}}',
}
RETROFIT = """
trainer: {default_root_dir: run, max_steps: 3, accelerator: cpu, devices: 1}
model:
  class_path: DMCModule
  init_args:
    base: kvtrain:copy
    phases: [{name: retrofit, steps: 3, learning_rate: 0.001}]
data: {tokenizer: kvtrain:copy, corpus: train.jsonl, validation_corpus: held.jsonl, sequence_length: 32, batch_size: 2}
"""
METRICS: dict[str, str | bytes] = {
    "garbage": "no,step\n1,2\n",
    "letters": "step,loss\n0,a\n",
    "nothing": "",
    "header": "step,loss\n",
    "bytes": b"step,loss\n0,\x80\n",
    "cut": "step,loss\n0,1.0\n1\n",
    "negative": "step,loss\n-1,1.0\n",
    "halfstep": "step,loss\n0.5,1.0\n",
    "nul": "step,loss\n0,\x00\n",
}


def build(place: Path) -> None:
    """Write everything."""
    write_place(place)
    (place / "good.yaml").write_text(recipe_text(Path(), Path("run")))
    (place / "retrofit.yaml").write_text(RETROFIT)
    (place / "chat.yaml").write_text(CHAT_RECIPE)
    for folder, contents in (("", RECIPES), ("", CORPORA), ("chats", CHATS), ("", DEEPSPEED)):
        for name, content in contents.items():
            _write(place / folder / name, content)
    (place / "emptydir").mkdir()
    (place / "afile").write_text("a file\n")
    _write_runs(place / "reports")
    _write_models(place / "models")
    _write_tokenizers(place / "tokenizers")
    _write_checkpoints(place / "trained")
    _write_shards(place / "shards")


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_runs(folder: Path) -> None:
    for name, content in METRICS.items():
        _write(folder / name / "metrics.csv", content)
    for name in ("good", "badeval", "evallist", "badheads", "badmap", "badgates"):
        _write(folder / name / "metrics.csv", "step,loss\n0,2.0\n1,1.0\n")
    _write(folder / "badeval" / "eval.json", "{")
    _write(folder / "evallist" / "eval.json", '[{"by_position": [{"position": "x"}]}]')
    _write(folder / "badheads" / "head_compression.csv", "step,layer\n0,1\n")
    _write(folder / "badgates" / "head_gates.csv", "step,layer\n0,1\n")
    _write(folder / "badmap" / "kv_map.csv", "layer,key_layer,value_layer,sliding\n3,0,0,0\n")


def _write_models(folder: Path) -> None:
    """Folders that are nearly models."""
    good = json.loads((ASSETS / "copy" / "config.json").read_text())
    weights = (ASSETS / "copy" / "model.safetensors").read_bytes()
    broken: dict[str, tuple[str, bytes | None]] = {
        "noweights": (json.dumps(good), None),
        "truncated": (json.dumps(good), weights[:5000]),
        "emptyweights": (json.dumps(good), b""),
        "badconfig": ("{", weights),
        "listconfig": ("[]", weights),
        "notype": ('{"hidden_size": 3}', weights),
        "gpt2": (json.dumps({**good, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}), weights),
        "unknowntype": (json.dumps({**good, "model_type": "lllama"}), weights),
        "vocabulary": (json.dumps({**good, "vocab_size": good["vocab_size"] + 7}), weights),
        "wordsize": (json.dumps({**good, "hidden_size": "wide"}), weights),
        "nomethod": (json.dumps({"model_type": "kvtrain", "text_config": good, "method_config": {}}), weights),
        "newmethod": (
            json.dumps({"model_type": "kvtrain", "text_config": good, "method_config": {"name": "zip"}}),
            weights,
        ),
    }
    for name, (config, content) in broken.items():
        _write(folder / name / "config.json", config)
        if content is not None:
            _write(folder / name / "model.safetensors", content)
    _write(folder / "file", "no folder")
    _write_masked(folder / "masked")
    shutil.copytree(ASSETS / "copy", folder / "notokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    _write(folder / "host.json", json.dumps({**HOST, "num_attention_heads": 3}))
    _write(folder / "bad.json", "{")


def _write_masked(folder: Path) -> None:
    """A model that fills gaps."""
    from kvtrain import TransNormerConfig, TransNormerForMaskedLM

    sizes: dict[str, int] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1024}
    TransNormerForMaskedLM(TransNormerConfig(causal=False, **sizes)).save_pretrained(folder)


def _write_tokenizers(folder: Path) -> None:
    for name, content in (("broken", "{"), ("list", "[]"), ("hollow", "{}"), ("bytes", b"\x80")):
        _write(folder / name / "tokenizer.json", content)
        _write(folder / name / "tokenizer_config.json", "{}")


def _write_checkpoints(folder: Path) -> None:
    """Run folders whose checkpoints cannot be read, and two that are no checkpoints of ours."""
    import torch

    _write(folder / "garbage" / "checkpoints" / "step-000001.ckpt", "garbage")
    _write(folder / "empty" / "checkpoints" / "step-000001.ckpt", "")
    (folder / "nothing" / "checkpoints").mkdir(parents=True)
    (folder / "sharded" / "checkpoints" / "step-000001.ckpt").mkdir(parents=True)
    for name, content in (("foreign", {"weights": torch.zeros(2)}), ("tensor", torch.zeros(2))):
        (folder / name / "checkpoints").mkdir(parents=True)
        torch.save(content, folder / name / "checkpoints" / "step-000001.ckpt")
    for name, export in (("badjson", "{"), ("notype", '{"config": {}}'), ("noconfig", "{}")):
        (folder / name / "checkpoints").mkdir(parents=True)
        torch.save({"kvtrain_export": export, "state_dict": {}}, folder / name / "checkpoints" / "step-000001.ckpt")
    _write_good_run(folder / "good", "kvtrain:copy")
    _write_good_run(folder / "losttokenizer", "nope/tokenizer")


def _write_good_run(run: Path, tokenizer: str) -> None:
    """A run of the packaged model as it is."""
    import torch

    from kvtrain import Full, retrofit
    from kvtrain.inference.load import load

    model = retrofit(load("kvtrain:copy"), Full())
    export = {"config": json.loads(model.config.to_json_string(use_diff=False)), "tokenizer": tokenizer}
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    (run / "checkpoints").mkdir(parents=True)
    content = {"kvtrain_export": json.dumps(export), "state_dict": weights}
    torch.save(content, run / "checkpoints" / "step-000001.ckpt")


def _write_shards(folder: Path) -> None:
    manifest = {"vocab_size": 9, "num_tokens": 4, "num_documents": 1, "num_bytes": 4, "shards": [4]}
    manifest |= {"tokenizer_sha256": "x", "version": 1}
    contents = {"badjson": "{", "version": json.dumps({**manifest, "version": 9}), "list": "[]", "missing": "{}"}
    contents |= {"sum": json.dumps({**manifest, "shards": [5]}), "noarrays": json.dumps(manifest)}
    for name, content in contents.items():
        _write(folder / name / "manifest.json", content)


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder; folders have no size of their own."""
    found = {}
    for path in place.rglob("*"):
        state = path.lstat()
        found[path.relative_to(place).as_posix()] = (0, 0) if path.is_dir() else (state.st_size, state.st_mtime_ns)
    return found
