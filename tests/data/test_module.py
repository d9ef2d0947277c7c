"""The data module: prepares once, mixes corpora, takes prepared folders, refuses foreign tokens."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtrain.data import prepare
from kvtrain.data.module import PackedDataModule, default_cache
from kvtrain.data.prepare import prepare_corpus
from kvtrain.data.shards import MANIFEST
from kvtrain.data.tokenizer import train_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"some words, number {n}. " * 4}) + "\n" for n in range(30)))
    (tmp_path / "more.txt").write_text("and quite another text " * 40)
    (tmp_path / "heldout.txt").write_text("words that are held out " * 40)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Corpora that were really tokenised."""
    made: list[list[str]] = []

    def spy(corpora: list[str], *args: Any, **options: Any) -> Any:
        made.append(corpora)
        return prepare_corpus(corpora, *args, **options)

    monkeypatch.setattr(prepare, "prepare_corpus", spy)
    return made


def module(text: Path, corpus: Any = None, **options: Any) -> PackedDataModule:
    options = {"sequence_length": 16, "batch_size": 2, "cache_dir": str(text / "cache"), **options}
    validation = options.pop("validation_corpus", str(text / "heldout.txt"))
    data = PackedDataModule(corpus=corpus or str(text / "train.jsonl"), validation_corpus=validation, **options)
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_rank=1, world_size=2, distributed_sampler_kwargs=None
    )
    return data


def decoded(data: PackedDataModule, tokenizer: Any, corpora: list[str]) -> str:
    rows = data.rows(corpora)
    ids = [token for row in range(len(rows)) for token in rows.batch([row])["input_ids"][0].tolist()]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_it_prepares_once(text: Path, calls: list[list[str]]):
    first = module(text)
    first.prepare_data()
    assert calls == [[str(text / "train.jsonl")], [str(text / "heldout.txt")]]
    first.prepare_data()
    again = module(text)
    again.prepare_data()
    again.train_dataloader(), again.val_dataloader()
    assert len(calls) == 2
    (text / "train.jsonl").write_text('{"text": "changed, and long enough for a window of sixteen rows"}\n' * 40)
    module(text).prepare_data()
    assert calls[2:] == [[str(text / "train.jsonl")]]
    module(text, text_column="text", tokenizer="kvtrain:tiny").prepare_data()
    assert len(calls) == 3


def test_it_knows_the_trainer(text: Path):
    data = module(text, seed=5)
    loader = data.train_dataloader()
    assert (loader.window, loader.rank, loader.world_size, loader.seed, loader.batch_size) == (2, 1, 2, 5, 2)
    validation = module(text, validation_rows=3).val_dataloader()
    assert (validation.seed, validation.rank, validation.world_size) == (None, 1, 2)
    assert sum(len(batch["row_ids"]) for batch in validation) == 1  # the third row of three, on rank 1 of 2
    data.trainer = None
    assert data.val_dataloader().world_size == 1


def test_several_corpora_are_one(text: Path, tokenizer: Any):
    corpora = [str(text / "more.txt"), str(text / "train.jsonl")]
    data = module(text, corpora)
    found = decoded(data, tokenizer, corpora)
    assert found.startswith("and quite another text") and "number 29. " in found
    assert data.train_dataloader().rows is data.rows(corpora)


def test_a_prepared_folder_is_a_corpus(text: Path, tokenizer: Any, calls: list[list[str]]):
    folder = text / "tokens"
    prepare_corpus([str(text / "train.jsonl")], tokenizer, folder)
    data = module(text, str(folder), validation_corpus=str(folder))
    data.prepare_data()
    assert calls == []
    assert "number 29. " in decoded(data, tokenizer, [str(folder)])
    with pytest.raises(ValueError, match="a folder of tokens, not of text; give it as the only corpus"):
        module(text, [str(folder), str(text / "more.txt")]).prepare_data()


def test_tokens_of_another_tokenizer_are_refused(text: Path, tokenizer: Any):
    other = train_tokenizer(["some words"], 300, text / "other")
    prepare_corpus([str(text / "train.jsonl")], other, text / "tokens")
    with pytest.raises(ValueError, match="written with another tokenizer than 'kvtrain:tiny'") as caught:
        module(text, str(text / "tokens")).train_dataloader()
    assert str(caught.value).startswith(str(text / "tokens"))
    assert str(caught.value).endswith("name the one that prepared it, or prepare the corpus again")
    module(text, str(text / "tokens"), tokenizer=str(text / "other")).train_dataloader()
    module(text, str(text / "tokens"), tokenizer=None).train_dataloader()
    manifest = text / "tokens" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tokenizer_sha256": ""}))
    module(text, str(text / "tokens")).train_dataloader()


def test_text_needs_a_tokenizer(text: Path):
    with pytest.raises(ValueError, match=r"train\.jsonl: text needs a tokenizer; set one, or give a prepared folder"):
        module(text, tokenizer=None).prepare_data()


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("validation_rows", 0), ("batch_size", -2)])
def test_sizes(name: str, value: int):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not {value}"):
        PackedDataModule(**{name: value})


def test_a_cache_that_cannot_be_written(text: Path):
    (text / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(str(text / "file"))):
        module(text, cache_dir=str(text / "file")).prepare_data()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KVTRAIN_CACHE", str(tmp_path))
    assert default_cache() == PackedDataModule().cache_dir == tmp_path
    monkeypatch.delenv("KVTRAIN_CACHE")
    assert default_cache() == Path.home() / ".cache" / "kvtrain"
