"""Whole chats in rows of fixed length: none goes on in the next row, where an answer would lack its question.

Rows are filled best-fit decreasing: the longest chats first, each into the fullest row that still has room. Inside a
row positions restart and document ids change at every chat, as in ``PackedRows``; what is left at its end is padding.
"""

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtrain.data.packing import IGNORE_INDEX, PackedRows
from kvtrain.data.shards import TokenShards

TooLong = Literal["cut", "drop"]
Part = Literal["all", "training", "held out"]
Integers = npt.NDArray[np.int64]


class Fit(NamedTuple):
    """What became of texts that are longer than a row.

    Attributes:
        texts: All of them, long or not.
        cut: Those of which the first tokens of a row are learned.
        dropped: Those that are left out: all of the long ones, or those whose first tokens hold no answer.
    """

    texts: int
    cut: int
    dropped: int


@dataclass(frozen=True)
class Selection:
    """Which chats are packed.

    Attributes:
        part: All of them, or a part.
        share: Of the chats that are held out: those of the lowest keys, so that it depends on what is said alone.
    """

    part: Part = "all"
    share: float = 0.0

    def chosen(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which texts, by their chats' keys, are of the part.

        Raises:
            ValueError: The share holds out no chat, or all of them.
        """
        if self.part == "all":
            return np.ones(keys.size, dtype=bool)
        chats = np.unique(keys)  # in order
        held_out = round(self.share * chats.size)
        if not 0 < held_out < chats.size:
            raise ValueError(
                f"validation_share {self.share} holds {held_out} of {chats.size} different chats out; "
                "change it, or give validation_chats"
            )
        is_held_out: npt.NDArray[np.bool_] = keys < chats[held_out]
        return is_held_out if self.part == "held out" else ~is_held_out


class ChatRows(PackedRows):
    """Random access to the rows that a folder of chats packs into.

    Args:
        shards: Open folder of chats.
        sequence_length: Tokens in a row, at least 2.
        too_long: What becomes of a text longer than a row: ``"cut"`` keeps its first tokens, and leaves it out where no
            answer begins in them; ``"drop"`` leaves it out.
        selection: Which chats.

    Attributes:
        fit: What became of long texts.

    Raises:
        ValueError: The folder holds text, none of its chats is left, or ``sequence_length`` is below 2.
    """

    def __init__(
        self, shards: TokenShards, sequence_length: int, too_long: TooLong = "cut", selection: Selection | None = None
    ) -> None:
        if not shards.targets:
            raise ValueError(
                f"{shards.folder}: a folder of text, not of chats; write it with `kvtrain prepare --chats`"
            )
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")
        self.shards, self.sequence_length, self.too_long = shards, sequence_length, too_long
        self.selection = selection or Selection()
        self._shard, self._begin, length, targets = self._measure()
        chosen = self.selection.chosen(np.concatenate(shards.keys))
        long = chosen & (length > sequence_length)
        dropped = chosen & ((targets == 0) | (long & (too_long == "drop")))
        self.fit = Fit(int(chosen.sum()), int((long & ~dropped).sum()), int(dropped.sum()))
        kept = np.flatnonzero(chosen & ~dropped)
        if not kept.size:
            raise ValueError(f"{shards.folder}: no chat fits into {sequence_length} tokens; raise sequence_length")
        self._length = np.minimum(length, sequence_length)
        self._rows = [kept[row] for row in best_fit(self._length[kept], sequence_length)]
        self.num_targets = np.asarray([int(targets[row].sum()) for row in self._rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """See ``PackedRows``; how chats were chosen and cut is part of it."""
        parts = (self.shards.manifest.fingerprint, self.too_long, self.selection)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _measure(self) -> tuple[Integers, Integers, Integers, Integers]:
        """Shard, first token, length, and targets in the first row's worth, of every text."""
        shards, begins, lengths, targets = [], [], [], []
        for number, starts in enumerate(self.shards.starts):
            begin = np.asarray(starts, dtype=np.int64)
            end = np.append(begin[1:], self.shards.tokens[number].size)
            before = np.concatenate([[0], np.cumsum(self.shards.targets[number], dtype=np.int64)])
            last = np.minimum(end, begin + self.sequence_length)
            shards.append(np.full(begin.size, number))
            begins.append(begin)
            lengths.append(end - begin)
            targets.append(before[last] - before[begin + 1])  # nothing predicts a text's first token
        first, second, third, fourth = (np.concatenate(parts) for parts in (shards, begins, lengths, targets))
        return first, second, third, fourth

    def _row(self, row: int) -> tuple[Integers, ...]:
        ids, positions, documents = np.zeros((3, self.sequence_length), dtype=np.int64)
        labels = np.full(self.sequence_length, IGNORE_INDEX, dtype=np.int64)
        place = 0
        for document, text in enumerate(self._rows[row], 1):
            shard, begin, length = int(self._shard[text]), int(self._begin[text]), int(self._length[text])
            here, there = slice(place, place + length), slice(begin, begin + length)
            ids[here] = self.shards.tokens[shard][there]
            positions[here] = np.arange(length)
            documents[here] = document
            learned = np.array(self.shards.targets[shard][there])
            learned[0] = False
            labels[here] = np.where(learned, ids[here], IGNORE_INDEX)
            place += length
        return ids, positions, documents, labels


def best_fit(lengths: Integers, room: int) -> list[Integers]:
    """Pack lengths into bins, the longest first, each into the fullest bin that has room; equal ones in their order.

    Args:
        lengths: Of each thing, none above ``room``.
        room: Of a bin.

    Returns:
        Places in ``lengths`` for each bin, in the order in which they were put there.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # bins with so much room left, the latest last
    rooms: list[int] = []  # keys of it, in order
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        found = bisect_left(rooms, length)
        if found == len(rooms):
            left = room
            number = len(bins)
            bins.append([])
        else:
            left = rooms[found]
            number = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[found]
        bins[number].append(place)
        if left > length:
            if left - length not in by_room:
                insort(rooms, left - length)
            by_room[left - length].append(number)
    return [np.asarray(places, dtype=np.int64) for places in bins]
