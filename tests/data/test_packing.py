"""Packed rows against a loop over tokens that a reader can check by eye."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.packing import IGNORE_INDEX, PackedRows
from kvtrain.data.shards import ShardWriter, TokenShards

PROPERTY = settings(max_examples=60)
NAMES = ("input_ids", "position_ids", "document_ids", "labels")


def naive_rows(shards: list[list[tuple[int, bool]]], length: int) -> list[dict[str, list[int]]]:
    """Rows of every shard; a shard is a list of (id, whether a document starts here)."""
    rows = []
    for shard in shards:
        for begin in range(0, len(shard), length):
            row: dict[str, list[int]] = {name: [] for name in NAMES}
            position = document = 0
            for place, (token, starts) in enumerate(shard[begin : begin + length]):
                if starts or place == 0:
                    position, document = 0, document + 1
                first = position == 0
                for name, value in zip(
                    NAMES, (token, position, document, IGNORE_INDEX if first else token), strict=True
                ):
                    row[name].append(value)
                position += 1
            missing = length - len(row["input_ids"])
            for name, padding in zip(NAMES, (0, 0, 0, IGNORE_INDEX), strict=True):
                row[name] += [padding] * missing
            rows.append(row)
    return rows


def split_into_shards(pieces: list[tuple[list[int], bool]], shard_tokens: int) -> list[list[tuple[int, bool]]]:
    """What the writer promises: a shard ends with the piece that fills it."""
    shards: list[list[tuple[int, bool]]] = [[]]
    for ids, starts in pieces:
        if len(shards[-1]) >= shard_tokens:
            shards.append([])
        shards[-1] += [(token, starts and place == 0) for place, token in enumerate(ids)]
    return shards


@PROPERTY
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=23), st.booleans()), min_size=1, max_size=14),
    st.integers(2, 17),
    st.integers(1, 60),
)
def test_rows_are_those_of_the_loop(pieces: list[tuple[list[int], bool]], length: int, shard_tokens: int):
    """Documents in one piece or several, one shard or several."""
    pieces[0] = (pieces[0][0], True)
    with tempfile.TemporaryDirectory() as name:
        writer = ShardWriter(Path(name), 100, shard_tokens)
        for ids, starts in pieces:
            writer.add(ids, 1, "here", starts=starts)
        writer.finish("")
        rows = PackedRows(TokenShards(Path(name)), length)
        expected = naive_rows(split_into_shards(pieces, shard_tokens), length)
        assert len(rows) == len(expected)
        batch = rows.batch(np.arange(len(rows)))
    for column in NAMES:
        assert batch[column].tolist() == [row[column] for row in expected], column
    assert rows.num_targets.tolist() == [sum(label != IGNORE_INDEX for label in row["labels"]) for row in expected]


def test_a_batch_by_eye(write_shards: Callable[..., TokenShards]):
    rows = PackedRows(write_shards([[1, 2, 3], [4, 5, 6, 7, 8]]), 5)
    batch = rows.batch(np.asarray([1, 0]))
    ignored = IGNORE_INDEX
    expected = {
        "input_ids": [[6, 7, 8, 0, 0], [1, 2, 3, 4, 5]],
        "position_ids": [[0, 1, 2, 0, 0], [0, 1, 2, 0, 1]],
        "document_ids": [[1, 1, 1, 0, 0], [1, 1, 1, 2, 2]],
        "labels": [[ignored, 7, 8, ignored, ignored], [ignored, 2, 3, ignored, 5]],
        "row_ids": [1, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert rows.num_targets.tolist() == [3, 2]


def test_batches_do_not_share_memory_with_the_file(write_shards: Callable[..., TokenShards]):
    rows = PackedRows(write_shards([[1, 2, 3, 4]]), 4)
    rows.batch(np.asarray([0]))["input_ids"].zero_()
    assert rows.batch(np.asarray([0]))["input_ids"].tolist() == [[1, 2, 3, 4]]


def test_no_rows_make_an_empty_batch(write_shards: Callable[..., TokenShards]):
    batch = PackedRows(write_shards([[1, 2, 3, 4]]), 4).batch(np.asarray([], dtype=np.int64))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        **dict.fromkeys(NAMES, (0, 4)),
        "row_ids": (0,),
    }


def test_a_row_of_padding(write_shards: Callable[..., TokenShards]):
    batch = PackedRows(write_shards([[1, 2, 3, 4]]), 4).padding()
    assert batch["document_ids"].tolist() == [[0] * 4]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 4]


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_row_too_short_for_a_target(write_shards: Callable[..., TokenShards], length: int):
    with pytest.raises(ValueError, match=f"sequence_length must be at least 2, not {length}"):
        PackedRows(write_shards([[1, 2]]), length)


def test_only_the_rows_asked_for_are_read(write_shards: Callable[..., TokenShards], monkeypatch: pytest.MonkeyPatch):
    rows = PackedRows(write_shards([[1, 2, 3, 4]] * 50), 8)
    read: list[int] = []
    original = rows._row
    monkeypatch.setattr(rows, "_row", lambda row: read.append(row) or original(row))
    result: Any = rows.batch(np.asarray([7, 3]))
    assert read == [7, 3] and len(result["row_ids"]) == 2
