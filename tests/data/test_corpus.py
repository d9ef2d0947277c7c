"""Readers: what they read, in which order, and what they say about input that cannot be read."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kvtrain.assets import HELDOUT
from kvtrain.data import hub
from kvtrain.data import rows as rows_module
from kvtrain.data.corpus import is_heldout_module, read_corpus, stdlib_documents


def texts(corpus: Path | str, **options: Any) -> list[str]:
    return [document.text for document in read_corpus(str(corpus), **options)]


def refusal(corpus: Path | str, **options: Any) -> str:
    """The message, which is one line."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        texts(corpus, **options)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message
    return message


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_txt_is_one_document(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße,\n\nline\r\n".encode())
    (document,) = read_corpus(str(path))
    assert document.text == "Grüße,\n\nline\r\n"
    assert document.source == str(path)


def test_jsonl_rows(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n  \n{"text": "tw\\u00f6\\nlines"}\n', encoding="utf-8")
    documents = list(read_corpus(str(path)))
    assert [document.text for document in documents] == ["one", "twö\nlines"]
    assert [document.source for document in documents] == [f"{path} row 1", f"{path} row 4"]
    path.write_text('{"body": "other"}', encoding="utf-8")
    assert texts(path, text_column="body") == ["other"]


def test_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Over several row groups and batches, plain, large and dictionary strings."""
    monkeypatch.setattr(rows_module, "_PARQUET_BATCH_ROWS", 2)
    words = ["a", "b", "", "dé", "e"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        path = write_parquet(tmp_path / "a.parquet", text=pyarrow.array(words).cast(kind), n=list(range(5)))
        documents = list(read_corpus(str(path)))
        assert [document.text for document in documents] == words
        assert documents[4].source == f"{path} row 5"


def test_folders_are_read_in_name_order(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "c.TXT").write_text("fourth")
    (tmp_path / "notes.md").write_text("ignored")
    (tmp_path / "folder.txt").mkdir()
    assert texts(tmp_path) == ["first", "second", "third", "fourth"]


def test_heldout_text():
    rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    assert texts("heldout") == [row["text"] for row in rows]
    assert len(rows) > 10


def test_stdlib_split():
    """Stable, disjoint, and together everything; the names are those of files that are there."""
    train, heldout = ([d.source for d in stdlib_documents(heldout=flag)] for flag in (False, True))
    assert train == [document.source for document in read_corpus("stdlib")]
    assert train == sorted(train) or len(train) == len(set(train))
    assert not set(train) & set(heldout)
    tops = {source.split("/")[1] for source in train}, {source.split("/")[1] for source in heldout}
    assert not {top.removesuffix(".py") for top in tops[0]} & {top.removesuffix(".py") for top in tops[1]}
    assert "stdlib/json/decoder.py" in set(train) | set(heldout)
    assert 0.01 < len(heldout) / len(train) < 0.25
    assert not any("/test/" in source or "site-packages" in source for source in train + heldout)


def test_the_split_is_the_same_everywhere():
    """Frozen: another hash would leak the committed held-out text into training."""
    names = ["ast.py", "json", "asyncio", "ctypes", "collections", "typing.py", "wave.py", "turtle.py"]
    assert {name for name in names if is_heldout_module(name)} == {"collections", "ctypes"}
    assert is_heldout_module("ast") == is_heldout_module("ast.py")
    heldout_sources = {json.loads(line)["source"].split("/")[1] for line in HELDOUT.read_text().splitlines()}
    assert all(is_heldout_module(name) for name in heldout_sources)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', "not JSON (Expecting ',' delimiter, column 13)"),
        (b"nonsense", "not JSON (Expecting value, column 1)"),
        (b'{"text": "\xff"}', "not UTF-8 text; convert it first"),
        (b'["text"]', "expected an object with a 'text' field"),
        (b"3", "expected an object with a 'text' field"),
        (b'{"body": "a", "id": 1}', "no column 'text'; set text_column to one of 'body', 'id'"),
        (b'{"text": 3}', "field 'text' holds int, not text"),
        (b'{"text": null}', "field 'text' holds NoneType, not text"),
        (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair, not text"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON that can be read"),
    ],
)
def test_bad_jsonl_rows(tmp_path: Path, line: bytes, complaint: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    assert refusal(path).startswith(f"{path} row 3: {complaint}")


def test_txt_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    assert refusal(path) == f"{path} line 3: not UTF-8 text (byte 11); convert it first"


def test_bad_parquet(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", body=["a"], n=[1])
    assert refusal(path) == f"{path}: no column 'text'; set text_column to one of 'body', 'n'"
    assert refusal(path, text_column="n") == f"{path} row 1: field 'n' holds int, not text"
    write_parquet(path, text=["a", None])
    assert refusal(path) == f"{path} row 2: field 'text' holds NoneType, not text"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xff")]
    )
    write_parquet(path, text=broken)
    assert refusal(path) == f"{path} row 2: not UTF-8 text; convert it first"
    path.write_bytes(b"PAR1 nothing")
    assert refusal(path).startswith(f"{path}: not a readable parquet file (")
    path.write_bytes(b"")
    assert refusal(path).startswith(f"{path}: not a readable parquet file (")


def test_parquet_damaged_in_the_middle(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", text=[str(n) * 100 for n in range(8)])
    data = bytearray(path.read_bytes())
    middle = data.index(b"7" * 50) if b"7" * 50 in data else len(data) // 3
    data[middle - 60 : middle + 10] = b"\xff" * 70
    path.write_bytes(bytes(data))
    assert refusal(path).startswith(str(path))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    path.write_text("secret")

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(path) == f"{path}: cannot be read (Permission denied)"


def test_a_link_to_nowhere(tmp_path: Path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    assert refusal(tmp_path) == f"{tmp_path}/a.txt: cannot be read (No such file or directory)"


def test_paths_that_are_no_corpus(tmp_path: Path):
    assert refusal(tmp_path) == f"{tmp_path}: the folder holds no .txt, .jsonl, .parquet file"
    missing = tmp_path / "stdlbi"
    assert refusal(missing).startswith(f"{missing}: no such file or folder; a corpus is a path, 'hf:org/name'")
    for name, kind in (("a.csv", "'.csv' files"), ("README", "a file without an extension")):
        (tmp_path / name).write_text("a")
        wanted = f"{tmp_path / name}: cannot read {kind}; convert to .txt, .jsonl, .parquet"
        assert refusal(tmp_path / name) == wanted
    (tmp_path / "manifest.json").write_text("{}")
    assert refusal(tmp_path) == f"{tmp_path}: a folder of tokens, not of text; give it as the only corpus"


@pytest.fixture
def fresh_hub() -> Any:
    hub.why_unreachable.cache_clear()
    yield
    hub.why_unreachable.cache_clear()


def test_the_hub_without_a_network(fresh_hub: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """One line within seconds: the library by itself would retry for half a minute and print each attempt."""
    from huggingface_hub import constants

    for offline in (True, False):
        hub.why_unreachable.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        start = time.monotonic()
        message = refusal("hf:org/name:config")
        assert time.monotonic() - start < 5
        assert message.startswith("hf:org/name:config: the Hub cannot be reached (")
        assert message.endswith("download the dataset elsewhere as jsonl or parquet and give its path")
    assert capfd.readouterr() == ("", "")


def test_hub_rows(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked: list[Any] = []

    def load(repository: str, config: str | None, **options: Any) -> Any:
        asked.append((repository, config, options))
        yield {"text": "one"}
        yield {"text": "two"}
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_corpus("hf:org/name:config", split="test")
    assert [next(rows), next(rows)] == [("one", "hf:org/name:config row 1"), ("two", "hf:org/name:config row 2")]
    assert asked == [("org/name", "config", {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match=r"^hf:org/name:config: after row 2 \(reset\)$"):
        next(rows)
    next(read_corpus("hf:org/name:config@validation"))
    assert asked[-1] == ("org/name", "config", {"split": "validation", "streaming": True})
    assert refusal("hf:org/name", text_column="body").endswith(
        "row 1: no column 'body'; set text_column to one of 'text'"
    )


def test_a_hub_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load(*args: Any, **options: Any) -> Any:
        raise FileNotFoundError("no such dataset\nmany\nlines")

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refusal("hf:org/name") == "hf:org/name: cannot open split 'train' (no such dataset)"
