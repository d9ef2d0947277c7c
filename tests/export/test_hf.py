"""A checkpoint becomes a Hugging Face folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain.export.hf import export_run
from kvtrain.models.config import CHECKPOINT_KEY
from tests.hosts import make_host, random_ids


def write_run(folder, method, tokenizer=None, **host):
    """A run folder with a checkpoint such as training writes."""
    model = kvtrain.retrofit(make_host("qwen3", dtype=torch.float32, **host), method)
    settings = {"config": json.loads(model.config.to_json_string(use_diff=False)), "tokenizer": tokenizer}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, CHECKPOINT_KEY: json.dumps(settings)}, folder / "checkpoints" / "last.ckpt")
    return model


@pytest.mark.parametrize("method", [kvtrain.DMC(compression=3.0, window=7), kvtrain.Full()], ids=lambda m: m.name)
def test_what_comes_out_computes_what_went_in(tmp_path, method):
    trained, ids = write_run(tmp_path / "run", method, tie_word_embeddings=True), random_ids(2, 20)
    folder = export_run(tmp_path / "run", tmp_path / "out", dtype="float32")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, trained(ids).logits, atol=1e-5, rtol=1e-4)
    if method.name == "full":
        assert type(opened).__name__ == "Qwen3ForCausalLM"
        assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    else:
        assert type(opened) is type(trained) and opened.method == method
    half = AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", tmp_path / "half"), dtype="auto")
    assert half.dtype == torch.bfloat16


def test_card_and_tokenizer(tmp_path):
    write_run(tmp_path / "my-run", kvtrain.DMC(compression=3.0), "kvtrain:tiny")
    folder = export_run(tmp_path / "my-run", tmp_path / "out")
    card = (folder / "README.md").read_text()
    for part in ("# my-run", "library_name: kvtrain", "import kvtrain", '"compression": 3.0', "uncompressed cache"):
        assert part in card, part
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.bin")) and list(folder.glob("*.safetensors"))


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    write_run(tmp_path / "run", kvtrain.DMC())
    (tmp_path / "taken").mkdir()
    (tmp_path / "damaged.ckpt").write_bytes(b"no checkpoint at all")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "sharded" / "checkpoints" / "step-000001.ckpt").mkdir(parents=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    for run, output, options, message in (
        ("none", "out", {}, "no checkpoint"),
        ("run", "taken", {}, "exists already"),
        ("run", "out", {"dtype": "int8"}, "dtype must be one of"),
        ("damaged.ckpt", "out", {}, "not a readable checkpoint"),
        ("foreign.ckpt", "out", {}, "not a checkpoint of"),
        ("sharded", "out", {}, "DeepSpeed"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            export_run(tmp_path / run, tmp_path / output, **options)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_pickled_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"state_dict": {}, CHECKPOINT_KEY: "{}", "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        export_run(tmp_path / "bomb.ckpt", tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_pushing_needs_a_token_and_keeps_the_folder(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    write_run(tmp_path / "run", kvtrain.DMC())
    with pytest.raises(ValueError, match="hf auth login"):
        export_run(tmp_path / "run", tmp_path / "out", push_to="org/name")
    assert (tmp_path / "out" / "config.json").is_file()
