"""A sized, seeded, shuffled loader whose place is a number, so that resuming is exact."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtrain.data.packing import Batch, PackedRows
from kvtrain.data.resume import Identity, check_identity

# A trainer that does not know a length asks for a batch too many, and the place would be wrong.
_ENDLESS = 1 << 40


def _timed(loader: "PackedLoader | EndlessLoader", batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of a loader, which adds up how long they kept whoever asked for them waiting."""
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        loader.seconds_waited += time.perf_counter() - begin
        if batch is None:
            return
        yield batch


class PackedLoader:
    """Batches of packed rows for one rank, in an order that ``(seed, epoch)`` alone decides.

    Every training batch carries ``num_items``, the targets of its whole optimizer window over all
    ranks: dividing the summed loss by it makes accumulation exact on ragged rows.

    Args:
        rows: Rows to serve.
        batch_size: Rows per batch and rank.
        seed: Of the shuffle; None keeps the order, serves every row once and repeats none
            (evaluation: ranks past the end get fewer rows).
        window: Batches per optimizer step (``accumulate_grad_batches``); lengths are multiples of it.
        rank: This rank.
        world_size: Number of ranks.
        limit: Serve the first rows alone (evaluation).
        strict_resume: Refuse the place that a checkpoint has in other rows, or in another order.

    Attributes:
        seconds_waited: How long batches have been waited for so far.

    Raises:
        ValueError: The rows do not fill one optimizer window.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        *,
        seed: int | None,
        window: int = 1,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        strict_resume: bool = True,
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.strict_resume = strict_resume
        self.window, self.rank, self.world_size = window, rank, world_size
        self.epoch = self.cursor = 0
        self.seconds_waited = 0.0
        self._num_rows = len(rows) if limit is None else min(limit, len(rows))
        self._drawn: tuple[int, npt.NDArray[np.int64]] | None = None  # an epoch and its order
        self._windows = len(rows) // (batch_size * world_size * window)
        if seed is not None and self._windows == 0:
            raise ValueError(
                f"the corpus packs into {len(rows)} rows, fewer than one optimizer step takes "
                f"({batch_size} rows x {window} batches x {world_size} ranks); lower batch_size or sequence_length"
            )

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil(self._num_rows / (self.batch_size * self.world_size))
        return self._windows * self.window

    def __iter__(self) -> Iterator[Batch]:
        return _timed(self, self._batches())

    def _batches(self) -> Iterator[Batch]:
        # A trainer that knows the length never asks for the batch after the last, so the epoch is turned
        # here and not at the end; evaluation always starts at the first row.
        if self.seed is None:
            self.cursor = 0
        elif self.cursor >= len(self):
            self.epoch, self.cursor = self.epoch + 1, 0
        order = self._order(self.epoch)
        while self.cursor < len(self):
            step = self.cursor
            self.cursor += 1
            yield self._batch(order, step)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self._num_rows)
        if self._drawn is None or self._drawn[0] != epoch:  # of as many numbers as the corpus has rows
            self._drawn = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._drawn[1]

    def training_batch(self, number: int) -> Batch:
        """Any batch of the endless training, epoch after epoch, whatever this loader's place."""
        epoch, step = divmod(number, len(self))
        return self._batch(self._order(epoch), step)

    def _batch(self, order: npt.NDArray[np.int64], step: int) -> Batch:
        size = self.batch_size * self.world_size
        everyone = order[step * size : (step + 1) * size]
        mine = everyone[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        batch = self.rows.batch(mine) if len(mine) else self.rows.padding()
        if self.seed is not None:
            first = step - step % self.window
            window = order[first * size : (first + self.window) * size]
            batch["num_items"] = torch.tensor(self._num_targets(window))
        return batch

    def _num_targets(self, rows: npt.NDArray[np.int64]) -> int:
        return int(self.rows.num_targets[rows].sum())

    def identity(self) -> Identity:
        """What the order of rows depends on."""
        return {
            "corpus": self.rows.fingerprint,
            "rows": len(self.rows),
            "sequence_length": self.rows.sequence_length,
            "seed": -1 if self.seed is None else self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, and in what; Lightning stores it in every checkpoint."""
        size = self.batch_size * self.world_size
        return {"epoch": self.epoch, "cursor": self.cursor, "rows_per_batch": size, "data": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly there, also with other batch or world sizes where their optimizer windows meet.

        Raises:
            ValueError: The place lies inside a window of this loader, or in other data.
        """
        check_identity(state.get("data"), self.identity(), self.strict_resume)
        size = self.batch_size * self.world_size
        old_size = state.get("rows_per_batch", size)
        rows = state["cursor"] * old_size
        if old_size != size and rows % (size * self.window):
            raise ValueError(
                f"cannot resume {rows} rows into the epoch with {size * self.window} rows per step; "
                f"resume with {old_size} rows per batch over all ranks, as before"
            )
        self.epoch, self.cursor = state["epoch"], rows // size


class EndlessLoader(ABC):
    """Batches of samples that are made as they are needed; the place of one rank is a number.

    Args:
        batch_size: Rows per batch and rank of validation.
        window: Batches per optimizer step.
        rank: This rank.
        world_size: Number of ranks.
        validation_rows: Serve so many held-out samples, once, in place of endless training.
        strict_resume: Refuse the place that a checkpoint has among other samples.

    Attributes:
        seconds_waited: How long batches have been waited for so far.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        window: int = 1,
        rank: int = 0,
        world_size: int = 1,
        validation_rows: int | None = None,
        strict_resume: bool = True,
    ) -> None:
        self.strict_resume = strict_resume
        self.batch_size, self.validation_rows = batch_size, validation_rows
        self.window, self.rank, self.world_size = window, rank, world_size
        self.cursor = 0
        self.seconds_waited = 0.0

    @abstractmethod
    def training_batch(self, number: int) -> Batch:
        """This rank's share of a batch, with ``num_items``."""

    @abstractmethod
    def validation_batch(self, rows: range, first_row: int) -> Batch:
        """Held-out samples; without rows one that has no target, for a rank past the end."""

    @abstractmethod
    def identity(self) -> Identity:
        """What the samples depend on beside their numbers."""

    def __len__(self) -> int:
        if self.validation_rows is None:
            return _ENDLESS
        return math.ceil(self.validation_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        return _timed(self, self._batches())

    def _batches(self) -> Iterator[Batch]:
        if self.validation_rows is not None:
            for start in range(0, self.validation_rows, self.batch_size * self.world_size):
                first = start + self.rank * self.batch_size
                yield self.validation_batch(range(first, min(self.validation_rows, first + self.batch_size)), first)
            return
        while True:
            number = self.cursor
            self.cursor += 1
            yield self.training_batch(number)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, and in what; Lightning stores it in every checkpoint."""
        return {"cursor": self.cursor, "data": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly there.

        Raises:
            ValueError: The place lies in other data.
        """
        check_identity(state.get("data"), self.identity(), self.strict_resume)
        self.cursor = state["cursor"]
