"""Shard folders that are damaged, unfinished or of another version are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtrain.data.shards import MANIFEST, TokenShards, new_folder

from .conftest import fill


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path, [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]], shard_tokens=4)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        TokenShards(folder)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_was_written_is_read(folder: Path):
    shards = TokenShards(folder)
    assert [tokens.tolist() for tokens in shards.tokens] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert [starts.tolist() for starts in shards.starts] == [[0, 3], [0], [0]]
    assert isinstance(shards.tokens[0], np.memmap)
    assert (shards.manifest.num_documents, shards.manifest.num_tokens, shards.manifest.num_bytes) == (4, 10, 30)


def test_no_manifest(folder: Path):
    wanted = f"no {MANIFEST}; write the folder with `kvtrain prepare`"
    assert refusal(folder / "gone") == f"{folder / 'gone'}: {wanted}"
    assert refusal(folder / MANIFEST) == f"{folder / MANIFEST}: {wanted}"
    (folder / MANIFEST).unlink()
    assert refusal(folder) == f"{folder}: {wanted}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_a_damaged_manifest(folder: Path, content: bytes):
    (folder / MANIFEST).write_bytes(content)
    assert refusal(folder).startswith(f"{folder}/{MANIFEST}: damaged (")


@pytest.mark.parametrize(
    "fields", [{"shards": [4, 4]}, {"shards": []}, {"shards": 3}, {"shards": [10, 0]}, {"surprise": 1}]
)
def test_a_manifest_that_does_not_add_up(folder: Path, fields: dict[str, Any]):
    edit(folder, **fields)
    assert refusal(folder).startswith(f"{folder}/{MANIFEST}: damaged (")


def test_another_version(folder: Path):
    """Even where its fields are other ones."""
    edit(folder, version=2, shard_names=["a"])
    assert refusal(folder) == f"{folder}: format 2, this kvtrain reads 1; prepare it again"


@pytest.mark.parametrize("name", ["tokens-00001.npy", "starts-00002.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty"])
def test_a_damaged_file(folder: Path, name: str, damage: str):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": data[:-1], "garbage": b"x" * len(data), "empty": b""}[damage])
    assert refusal(folder) == f"{path}: missing or damaged; prepare the corpus again"


def test_tokens_of_another_size_or_kind(folder: Path):
    path = folder / "tokens-00001.npy"
    np.save(path, np.arange(5, dtype=np.uint16))
    assert refusal(folder) == f"{folder}: shard 1 has 5 tokens, not 4; prepare it again"
    np.save(path, np.arange(4, dtype=np.float32))
    assert refusal(folder).startswith(f"{folder}: shard 1 has")


@pytest.mark.parametrize("starts", [[0, 4], [0, 3, 3], [3, 0], [-1, 2], [[0], [1]], [0.0, 1.0]])
def test_damaged_starts(folder: Path, starts: list[Any]):
    np.save(folder / "starts-00000.npy", np.asarray(starts))
    assert refusal(folder) == f"{folder}: shard 0 has damaged document starts; prepare it again"


def test_an_object_array_is_not_unpickled(folder: Path):
    np.save(folder / "starts-00000.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    assert "missing or damaged" in refusal(folder)


def test_a_new_folder_appears_at_once_or_never(tmp_path: Path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("done")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "done"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failed_folder_vanishes(tmp_path: Path, error: BaseException):
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_tells_contents_and_not_places(write_shards):
    """The same tokens have it anywhere; one other token, or another border, changes it."""
    folders = [[[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6]], [[1, 2], [3, 4, 5]]]
    found = [write_shards(documents).manifest.fingerprint for documents in folders]
    assert found[0] == found[1]
    assert len(set(found)) == 3
