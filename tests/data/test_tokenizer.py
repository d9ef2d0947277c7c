"""Tokenizers: loaded, trained, and refused in one line."""

import time
from pathlib import Path
from typing import Any

import pytest

from kvtrain.assets import ASSETS, resolve
from kvtrain.data import hub
from kvtrain.data.tokenizer import END_OF_TEXT, PADDING, load_tokenizer, train_tokenizer


def refusal(name: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tiny_one(tokenizer: Any):
    ids = tokenizer("def f(x): return 1234  # Grüße 🙂")["input_ids"]
    assert tokenizer.decode(ids) == "def f(x): return 1234  # Grüße 🙂"
    assert [tokenizer.decode([token]) for token in tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT


def test_trained_and_loaded_are_one(tmp_path: Path):
    trained = train_tokenizer(["some words, some more words"] * 3, 270, tmp_path / "new")
    loaded = load_tokenizer(str(tmp_path / "new"))
    text = "some words é 12\n\n  more"
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) <= 270 and (loaded.pad_token, loaded.eos_token) == (PADDING, END_OF_TEXT)


def test_a_vocabulary_below_the_bytes(tmp_path: Path):
    with pytest.raises(ValueError, match="a vocabulary of 257 cannot hold all bytes; use at least 258"):
        train_tokenizer(["a"], 257, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_assets():
    assert resolve("kvtrain:tiny") == str(ASSETS / "tiny")
    assert resolve("org/name") == "org/name" and resolve("/a/b") == "/a/b"
    for name in ("kvtrain:", "kvtrain:..", "kvtrain:huge", "kvtrain:../assets/tiny", "kvtrain:__pycache__"):
        there = "it has kvtrain:copy, kvtrain:recall, kvtrain:tiny"
        with pytest.raises(ValueError, match=f"^the package carries no model '.+'; {there}"):
            resolve(name)


def test_folders_without_a_tokenizer(tmp_path: Path):
    assert refusal(str(tmp_path)).startswith(f"no tokenizer at '{tmp_path}' (")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert refusal(str(tmp_path)).startswith(f"no tokenizer at '{tmp_path}' (")


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """At once and quietly, however the libraries were told about being offline."""
    monkeypatch.setattr(hub, "why_unreachable", lambda: "no network")
    monkeypatch.setattr("kvtrain.data.tokenizer.why_unreachable", lambda: "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    start = time.monotonic()
    assert refusal("org/name") == (
        "no tokenizer at 'org/name' (no such folder, nothing in the Hub's cache, "
        "and the Hub cannot be reached: no network)"
    )
    assert time.monotonic() - start < 5
    assert capfd.readouterr() == ("", "")
