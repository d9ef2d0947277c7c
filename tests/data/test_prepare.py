"""Tokenising into shards: what is written, that nothing is left after a failure, and cache names."""

import errno
import itertools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtrain.data import prepare
from kvtrain.data.corpus import Document, read_corpus
from kvtrain.data.prepare import corpus_fingerprint, prepare_corpus, prepare_once, tokenizer_digest
from kvtrain.data.shards import MANIFEST, ShardWriter, TokenShards


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [{"text": f"def function_{n}(x):\n    return x + {n}\n" * (1 + n % 5)} for n in range(40)]
    rows.insert(7, {"text": ""})
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.txt").write_text("the last one é")
    return folder


def written(folder: Path) -> list[list[int]]:
    """Documents of a shard folder, whatever shards they lie in."""
    shards = TokenShards(folder)
    ids = np.concatenate([np.asarray(tokens) for tokens in shards.tokens])
    offsets = np.cumsum([0, *[tokens.size for tokens in shards.tokens]])
    starts = np.concatenate([np.asarray(s) + o for s, o in zip(shards.starts, offsets[:-1], strict=True)])
    return [piece.tolist() for piece in np.split(ids, starts[1:])]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "text")


def whole(corpus: Path, tokenizer: Any) -> list[list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encode = tokenizer.backend_tokenizer.encode
    documents = [encode(d.text, add_special_tokens=False).ids for d in read_corpus(str(corpus)) if d.text]
    return [[bos, *ids, eos] for ids in documents]


def test_what_is_written(corpus: Path, tmp_path: Path, tokenizer: Any):
    manifest = prepare_corpus([str(corpus)], tokenizer, tmp_path / "out", shard_tokens=200)
    expected = whole(corpus, tokenizer)
    assert len(manifest.shards) > 3
    assert written(tmp_path / "out") == expected
    assert manifest == TokenShards(tmp_path / "out").manifest
    assert manifest.num_documents == len(expected) == 41
    assert manifest.num_tokens == sum(map(len, expected)) == sum(manifest.shards)
    assert manifest.num_bytes == sum(len(d.text.encode()) for d in read_corpus(str(corpus)))
    assert manifest.vocab_size == len(tokenizer)
    assert manifest.tokenizer_sha256 == tokenizer_digest(tokenizer)
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize("limit", [13, 60, 400])
def test_long_documents_come_in_bounded_pieces(
    corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limit: int
):
    """No call of the tokenizer sees more than the limit, and yet no text is lost; cuts at lines change no id."""
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", limit)
    calls: list[list[str]] = []
    original = type(tokenizer).__call__

    def spy(self: Any, texts: list[str], **options: Any) -> Any:
        calls.append(texts)
        return original(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    manifest = prepare_corpus([str(corpus)], tokenizer, tmp_path / "out", shard_tokens=100)
    assert max(sum(map(len, texts)) for texts in calls) <= limit
    assert max(manifest.shards) < 100 + limit + 2
    found, expected = written(tmp_path / "out"), whole(corpus, tokenizer)
    assert len(found) == manifest.num_documents == len(expected)
    assert [tokenizer.decode(ids) for ids in found] == [tokenizer.decode(ids) for ids in expected]
    if limit >= 60:
        assert found == expected
    assert manifest.num_bytes == sum(len(d.text.encode()) for d in read_corpus(str(corpus)))


@pytest.mark.parametrize("text", ["x" * 1000, "a " * 500, "\n" * 1000, "ab\n  cd\n" * 125, " " * 1000, "é\n" * 500])
def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 64)
    pieces = list(prepare._pieces(Document(text, "here")))
    assert "".join(piece.text for piece in pieces) == text
    assert all(0 < len(piece.text) <= 64 for piece in pieces)
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_an_id_beyond_the_vocabulary(corpus: Path, tmp_path: Path, tokenizer: Any):
    with pytest.raises(ValueError, match=r"a\.jsonl row 1: token id \d+ lies outside the vocabulary of 100; the tok"):
        prepare_corpus([str(corpus)], tokenizer, tmp_path / "out", vocab_size=100)
    assert left_behind(tmp_path) == []
    writer = ShardWriter(tmp_path, 10)
    writer.add([0, 9], 1, "fine")
    for wrong in ([3, 10], [-1, 3]):
        with pytest.raises(ValueError, match=f"there: token id {10 if 10 in wrong else -1} lies outside"):
            writer.add(wrong, 1, "there")


@pytest.mark.parametrize(("vocab_size", "bits"), [(1 << 16, 16), ((1 << 16) + 1, 32)])
def test_the_widest_id_survives(tmp_path: Path, vocab_size: int, bits: int):
    writer = ShardWriter(tmp_path, vocab_size)
    writer.add([0, vocab_size - 1], 2, "here")
    writer.finish("")
    (tokens,) = TokenShards(tmp_path).tokens
    assert tokens.dtype == f"uint{bits}" and tokens.tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("content", ["", '{"text": ""}\n\n{"text": ""}\n'])
def test_an_empty_corpus(tmp_path: Path, tokenizer: Any, content: str):
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^the corpus is empty: no document holds any text$"):
        prepare_corpus([str(path)], tokenizer, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_bad_input_leaves_nothing(corpus: Path, tmp_path: Path, tokenizer: Any):
    (corpus / "c.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl row 2: field 'text' holds int, not text$"):
        prepare_corpus([str(corpus)], tokenizer, tmp_path / "out", shard_tokens=50)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"), (OSError("9 of 10 written"),) * 2],
)
def test_a_full_disk(
    corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: Any
):
    """The second shard does not fit; NumPy tells of a short write without an error number."""
    monkeypatch.setattr(np, "save", failing(np.save, error))
    with pytest.raises(ValueError, match="writing failed") as caught:
        prepare_corpus([str(corpus)], tokenizer, tmp_path / "out", shard_tokens=100)
    assert str(caught.value) == f"{tmp_path / 'out'}: writing failed ({reason}); nothing was kept"
    assert left_behind(tmp_path) == []


def test_an_interrupt_leaves_nothing(corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(np, "save", failing(np.save, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus([str(corpus)], tokenizer, tmp_path / "out", shard_tokens=100)
    assert left_behind(tmp_path) == []


def failing(save: Any, error: BaseException) -> Any:
    """``np.save`` that works twice (one shard) and then fails."""
    count = itertools.count()

    def save_or_fail(*args: Any, **options: Any) -> None:
        if next(count) >= 2:
            raise error
        save(*args, **options)

    return save_or_fail


def test_an_output_that_exists(corpus: Path, tmp_path: Path, tokenizer: Any):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"out exists already; remove it or choose another output folder$"):
        prepare_corpus([str(corpus)], tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out: cannot be created \(.+\)$"):
        prepare_corpus([str(corpus)], tokenizer, tmp_path / "file" / "out")


def test_the_bar_shows_speed(corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    bars: list[Any] = []
    make = prepare.token_progress
    monkeypatch.setattr(prepare, "token_progress", lambda things: bars.append(make(things)) or bars[-1])
    manifest = prepare_corpus([str(corpus)], tokenizer, tmp_path / "out")
    (task,) = bars[0].tasks
    assert (task.completed, task.fields["tokens"]) == (41, manifest.num_tokens)
    shown = bars[0].columns[3].render(task).plain
    assert shown == f"documents, {manifest.num_tokens:,} tokens, {task.fields['rate']:,.0f} tokens/s"
    assert task.fields["rate"] > 1000


def test_the_fingerprint_follows_what_matters(corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    def name(corpora: list[str] | None = None, column: str = "text", split: str = "train") -> str:
        return corpus_fingerprint(corpora or [str(corpus), "heldout"], tokenizer, column, split)

    seen = [name(), name(column="body"), name(split="test"), name(["heldout", str(corpus)]), name([str(corpus)])]
    seen += [name(["stdlib"]), name(["heldout"]), name(["hf:a/b"]), name(["hf:a/b", "hf:c"]), name(["hf:a/bhf:c"])]
    assert seen == [name(), *seen[1:]]
    (corpus / "b.txt").write_text("the last ONE é")
    seen.append(name())
    (corpus / "c.txt").write_text("more")
    seen.append(name())
    monkeypatch.setattr(prepare.platform, "python_version", lambda: "4.0.0")
    seen.append(name(["stdlib"]))
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_reads_no_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    monkeypatch.setattr(Path, "open", lambda self, *args: pytest.fail(f"{self} was read"))
    assert corpus_fingerprint(["stdlib", "heldout"], tokenizer, "text", "train")


def test_the_digest_is_of_the_rules_alone(tokenizer: Any):
    """Not of settings that a call leaves behind; of the special tokens around a document, though."""
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    eos = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.pad_token
    assert tokenizer_digest(tokenizer) != before
    tokenizer.eos_token = eos
    assert tokenizer_digest(tokenizer) == before


def test_contenders_do_not_fail_each_other(
    corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    """Three want one folder at once: one works, two wait for its lock file, all find the same."""
    calls: list[Path] = []

    def slowly(corpora: Any, tokenizer: Any, output: Path, **options: Any) -> None:
        calls.append(output)
        time.sleep(0.2)
        prepare_corpus(corpora, tokenizer, output, **options)

    def contend(_number: int) -> int:
        gate.wait(60)
        prepare_once([str(corpus)], tokenizer, target)
        return TokenShards(target).manifest.num_documents

    monkeypatch.setattr(prepare, "prepare_corpus", slowly)
    gate, target = threading.Barrier(3), tmp_path / "cache" / "name"
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(contend, range(3))) == [41] * 3
    assert calls == [target]
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["name"]


def test_a_race_that_no_lock_saw(corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """Another machine finishes first; what it wrote is used. An error without that stays an error."""
    calls: list[Path] = []

    def slower(corpora: Any, tokenizer: Any, output: Path, **options: Any) -> None:
        calls.append(output)
        if output.name == "raced":
            prepare_corpus(corpora, tokenizer, output, **options)
        raise ValueError("writing failed")

    monkeypatch.setattr(prepare, "prepare_corpus", slower)
    prepare_once([str(corpus)], tokenizer, tmp_path / "raced")
    prepare_once([str(corpus)], tokenizer, tmp_path / "raced")
    assert calls == [tmp_path / "raced"]
    with pytest.raises(ValueError, match="writing failed"):
        prepare_once([str(corpus)], tokenizer, tmp_path / "failed")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be created \(.*(File exists|Not a directory)\)"):
        prepare_once([str(corpus)], tokenizer, tmp_path / "file" / "name")
    assert not (tmp_path / "failed" / MANIFEST).exists()
