"""Whole chats in rows, against a loop that a reader can check by eye."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.chat.packing import ChatRows, Fit, Selection, best_fit
from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.data.shards import ShardWriter, TokenShards

Text = tuple[list[int], list[bool]]
NO = IGNORE_INDEX


@pytest.fixture
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenShards]:
    """Writes texts with their masks into a new folder and opens it; keys count up from 0."""

    def write(texts: list[Text], shard_tokens: int = 1 << 20, keys: list[int] | None = None) -> TokenShards:
        folder = tmp_path_factory.mktemp("chats")
        writer = ShardWriter(folder, 1000, shard_tokens)
        for number, (ids, targets) in enumerate(texts):
            key = keys[number] if keys else number
            writer.add(ids, 1, "here", targets=np.asarray(targets, dtype=bool), key=key)
        writer.finish("")
        return TokenShards(folder)

    return write


def text(number: int, length: int, learned: int) -> Text:
    """Ids that say whose they are; the last ones are learned."""
    return [100 * number + place for place in range(length)], [place >= length - learned for place in range(length)]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 20), max_size=30), st.integers(20, 30))
def test_bins_hold_everything_once(lengths: list[int], room: int):
    bins = best_fit(np.asarray(lengths, dtype=np.int64), room)
    assert sorted(place for places in bins for place in places.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in places) for places in bins]
    assert all(0 < size <= room for size in sizes)
    assert sum(2 * size <= room for size in sizes) <= 1  # two such rows would be one


def test_bins_by_eye():
    bins = best_fit(np.asarray([3, 5, 2, 7, 1, 7]), 10)
    assert [places.tolist() for places in bins] == [[3, 2, 4], [5, 0], [1]]


@pytest.mark.parametrize("shard_tokens", [1, 1 << 20])
def test_a_batch_by_eye(write: Callable[..., TokenShards], shard_tokens: int):
    """The same from one shard and from one a chat."""
    rows = ChatRows(write([text(1, 3, 1), text(2, 5, 2), text(3, 2, 1)], shard_tokens), 6)
    batch = rows.batch(np.asarray([1, 0]))
    expected = {
        "input_ids": [[100, 101, 102, 300, 301, 0], [200, 201, 202, 203, 204, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]],
        "document_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0]],
        "labels": [[NO, NO, 102, NO, 301, NO], [NO, NO, NO, 203, 204, NO]],
        "row_ids": [1, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert (len(rows), rows.num_targets.tolist(), rows.fit) == (2, [2, 2], Fit(3, 0, 0))
    assert rows.padding()["labels"].tolist() == [[NO] * 6]


def test_the_first_token_of_a_text_is_never_learned(write: Callable[..., TokenShards]):
    rows = ChatRows(write([([1, 2, 3], [True, True, False]), ([4, 5], [True, False])]), 8)
    assert rows.batch(np.asarray([0]))["labels"][0].tolist() == [NO, 2, NO, NO, NO, NO, NO, NO]
    assert (rows.num_targets.tolist(), rows.fit) == ([1], Fit(2, 0, 1))


@pytest.mark.parametrize(
    ("too_long", "fit", "kept"), [("cut", Fit(4, 1, 1), [[100, 200, 400]]), ("drop", Fit(4, 0, 2), [[200, 400]])]
)
def test_what_is_too_long(write: Callable[..., TokenShards], too_long: Any, fit: Fit, kept: list[list[int]]):
    """Of four texts the first is cut inside its answer, and of the third nothing is left that is learned."""
    shards = write([text(1, 9, 6), text(2, 4, 1), text(3, 8, 2), text(4, 6, 1)])
    rows = ChatRows(shards, 6, too_long)
    batch = rows.batch(np.arange(len(rows)))
    starts = [ids[positions == 0] for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True)]
    assert sorted(int(number) for ids in starts for number in ids if number) == kept[0]
    assert rows.fit == fit
    assert rows.num_targets.sum() == (batch["labels"] != NO).sum()
    if too_long == "cut":
        (cut,) = (labels for labels, ids in zip(batch["labels"], batch["input_ids"], strict=True) if ids[0] == 100)
        assert cut.tolist() == [NO, NO, NO, 103, 104, 105]


def test_a_share_is_held_out_by_what_is_said(write: Callable[..., TokenShards]):
    """Texts of one chat are on one side, in whatever order chats come."""
    keys = [40, 10, 30, 10, 20, (1 << 64) - 1, 50]
    texts = [text(number, 3, 1) for number in range(1, 8)]
    order = [3, 6, 0, 2, 5, 4, 1]
    for places in (list(range(7)), order):
        shards = write([texts[place] for place in places], 4, [keys[place] for place in places])
        parts = {}
        for part in ("training", "held out"):
            rows = ChatRows(shards, 6, selection=Selection(part, 0.33))  # type: ignore[arg-type]
            batch = rows.batch(np.arange(len(rows)))
            ids = batch["input_ids"][(batch["position_ids"] == 0) & (batch["document_ids"] > 0)]
            parts[part] = sorted(ids.tolist())
        assert parts == {"training": [100, 300, 600, 700], "held out": [200, 400, 500]}


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_share_that_leaves_a_side_empty(write: Callable[..., TokenShards], share: float):
    with pytest.raises(ValueError, match=rf"validation_share {share} holds [02] of 2 different chats out; change it"):
        ChatRows(write([text(1, 3, 1), text(2, 3, 1)]), 6, selection=Selection("held out", share))


def test_folders_and_lengths_that_are_refused(write: Callable[..., TokenShards], write_shards: Any):
    with pytest.raises(ValueError, match="a folder of text, not of chats; write it with `kvtrain prepare --chats`"):
        ChatRows(write_shards([[1, 2, 3]]), 6)
    with pytest.raises(ValueError, match="sequence_length must be at least 2, not 1"):
        ChatRows(write([text(1, 3, 1)]), 1)
    with pytest.raises(ValueError, match="no chat fits into 4 tokens; raise sequence_length"):
        ChatRows(write([text(1, 9, 1)]), 4)
    shards = write([text(1, 3, 1)])
    np.save(shards.folder / "targets-00000.npy", np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="shard 0 has a damaged loss mask; prepare it again"):
        TokenShards(Path(shards.folder))


def test_the_name_of_rows_says_how_they_were_made(write: Callable[..., TokenShards]):
    texts = [text(number, 5, 2) for number in range(1, 9)]
    shards, other = write(texts), write([*texts[:-1], (texts[-1][0], [False] * 4 + [True])])
    halves = [Selection("training", 0.5), Selection("held out", 0.5), Selection("training", 0.25)]
    made = [ChatRows(shards, 6), ChatRows(shards, 6, "drop"), ChatRows(other, 6)]
    made += [ChatRows(shards, 6, selection=selection) for selection in halves]
    assert len({rows.fingerprint for rows in made}) == len(made)
    assert ChatRows(write(texts), 6).fingerprint == made[0].fingerprint
