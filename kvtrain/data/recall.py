"""Batches of tasks that need a long memory, passkeys or names in a haystack and runs to be copied, and of text."""

import math
from typing import Any

import numpy as np
import torch

from kvtrain.data.haystack import HaystackTask, Ids
from kvtrain.data.loader import EndlessLoader, PackedLoader
from kvtrain.data.module import PackedDataModule
from kvtrain.data.packing import IGNORE_INDEX, Batch
from kvtrain.data.passkey import PasskeyTask, copy_sample
from kvtrain.data.resume import Identity
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.data.shards import TokenShards
from kvtrain.data.tokenizer import load_tokenizer

_MULTIPLE = 16  # lengths are multiples of it
_VALIDATION_ROWS = 64


class HaystackDataModule(PackedDataModule):
    """Samples of a task over a corpus as haystack, with copying and plain text mixed in where asked for.

    Every batch has one length, and as many rows as keep its tokens at ``batch_size * sequence_length`` or just below.
    A sample depends on the seed, the batch's number and the row alone.

    Args:
        tokenizer: Folder, Hub id, or a model of the package.
        corpus: Text of the haystacks, as for ``PackedDataModule``.
        validation_corpus: Held-out text, likewise.
        task: What is hidden and asked for.
        shortest: Tokens of the shortest samples; lengths are uniform from here to ``sequence_length``. None: all
            samples have ``sequence_length``.
        growth_batches: Batches over which the longest length grows from ``shortest``, by equal factors; 0: none.
        copy_share: Share of samples that are runs to be copied, instead of the task's; samples too short for the task
            are runs in any case, where the share is above 0.
        text_share: Share of optimizer steps that learn packed rows of the corpus, every token of them, instead of
            samples: a step is of one sort, so that each sort has its own mean loss.
        **packed: See ``PackedDataModule``.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        tokenizer: str,
        corpus: str | list[str],
        validation_corpus: str | list[str],
        task: HaystackTask,
        shortest: int | None = None,
        growth_batches: int = 0,
        copy_share: float = 0.0,
        text_share: float = 0.0,
        **packed: Any,
    ) -> None:
        super().__init__(tokenizer, corpus, validation_corpus, **packed)
        self.task = task
        self.shortest = self.sequence_length if shortest is None else shortest
        self.growth_batches, self.copy_share, self.text_share = growth_batches, copy_share, text_share
        if not _MULTIPLE <= self.shortest <= self.sequence_length:
            raise ValueError(
                f"shortest must be from {_MULTIPLE} to sequence_length ({self.sequence_length}), not {self.shortest}"
            )
        if not 0.0 <= copy_share <= 1.0:
            raise ValueError(f"copy_share is a share, from 0 to 1, not {copy_share}")
        if not 0.0 <= text_share < 1.0:
            raise ValueError(f"text_share is a share, from 0 to below 1, not {text_share}")
        if growth_batches < 0:
            raise ValueError(f"growth_batches must not be negative, not {growth_batches}")

    @property
    def length_multiple(self) -> int:
        """See ``DataModule``; training rows are of all lengths."""
        return math.gcd(_MULTIPLE, self.sequence_length)

    def train_dataloader(self) -> "RecallLoader":  # type: ignore[override]
        """Batches without end, with ``num_items``."""
        return RecallLoader(self, self.shards(self.corpora), **self.training_shard)

    def val_dataloader(self) -> "RecallLoader":  # type: ignore[override]
        """The same samples of the task, of full length, every time."""
        rows = self.validation_rows or _VALIDATION_ROWS
        return RecallLoader(self, self.shards(self.validation_corpora), validation_rows=rows, **self.validation_shard)

    def shards(self, corpora: list[str]) -> TokenShards:
        """Tokens of some corpora, tokenised first if need be."""
        return self.rows(corpora).shards


class RecallDataModule(HaystackDataModule):
    """Passkeys over a corpus as haystack; see ``HaystackDataModule``.

    Args:
        tokenizer: Folder, Hub id or ``kvtrain:copy``.
        corpus: Text of the haystacks, as for ``PackedDataModule``.
        validation_corpus: Held-out text, likewise.
        task: The passkeys.
        **haystack: See ``HaystackDataModule``.
    """

    def __init__(
        self,
        tokenizer: str = "kvtrain:copy",
        corpus: str | list[str] = "stdlib",
        validation_corpus: str | list[str] = "heldout",
        task: PasskeyTask | None = None,
        **haystack: Any,
    ) -> None:
        super().__init__(tokenizer, corpus, validation_corpus, task or PasskeyTask(), **haystack)


class RetrievalDataModule(HaystackDataModule):
    """Keyed retrieval over a corpus as haystack; see ``HaystackDataModule``.

    Args:
        tokenizer: Folder, Hub id or ``kvtrain:tiny``.
        corpus: Text of the haystacks and of the steps on text, as for ``PackedDataModule``.
        validation_corpus: Held-out text, likewise.
        task: The names.
        **haystack: See ``HaystackDataModule``.
    """

    def __init__(
        self,
        tokenizer: str = "kvtrain:tiny",
        corpus: str | list[str] = "stdlib",
        validation_corpus: str | list[str] = "heldout",
        task: RetrievalTask | None = None,
        **haystack: Any,
    ) -> None:
        super().__init__(tokenizer, corpus, validation_corpus, task or RetrievalTask(), **haystack)


class RecallLoader(EndlessLoader):
    """Samples of a task, runs to be copied, and steps on text.

    Args:
        data: Settings of the samples.
        shards: The haystack.
        **place: See ``EndlessLoader``; validation has the task's samples of full length alone.

    Raises:
        ValueError: A sample cannot hold what the task asks for.
    """

    def __init__(self, data: HaystackDataModule, shards: TokenShards, **place: Any) -> None:
        super().__init__(data.batch_size, **place)
        assert data.tokenizer_name is not None
        self.data, self.shards = data, shards
        self.writer = data.task.writer(load_tokenizer(data.tokenizer_name))
        self._sizes = np.asarray(shards.manifest.shards, dtype=np.float64)
        self.writer.require(data.sequence_length if data.copy_share else _rounded(data.shortest))  # before it trains
        self._text: PackedLoader | None = None
        if data.text_share and self.validation_rows is None:
            rows = data.rows(data.corpora)
            self._text = PackedLoader(
                rows,
                data.batch_size,
                seed=data.seed,
                window=self.window,
                rank=self.rank,
                world_size=self.world_size,
            )

    def identity(self) -> Identity:
        """See ``EndlessLoader``."""
        corpus = self.shards.manifest.fingerprint
        mixture = {"task": self.data.task, "copy_share": self.data.copy_share, "text_share": self.data.text_share}
        own: Identity = {"corpus": corpus, "sequence_length": self.data.sequence_length, "seed": self.data.seed}
        return {**own, **{name: str(value) for name, value in mixture.items()}}

    def training_batch(self, number: int) -> Batch:
        """See ``EndlessLoader``; ``num_items`` counts the targets of all batches of the window, over all ranks."""
        text = self._text_batch(number)
        if text is not None:
            return text
        batch = self._batch(number, self.rank)
        first = number - number % self.window
        places = [(n, rank) for n in range(first, first + self.window) for rank in range(self.world_size)]
        others = [self._batch(*place) for place in places if place != (number, self.rank)]
        batch["num_items"] = torch.stack([_targets(one) for one in (batch, *others)]).sum()
        return batch

    def validation_batch(self, rows: range, first_row: int) -> Batch:
        """See ``EndlessLoader``."""
        length = self.data.sequence_length
        samples = [self._sample(np.random.default_rng([0, row]), length) for row in rows]
        return _collate(samples or [_nothing(length)], first_row=first_row)

    def _text_batch(self, number: int) -> Batch | None:
        """A batch of text, where the step that it belongs to is one on text; those are spread evenly."""
        step, place = divmod(number, self.window)
        before, after = (math.floor(steps * self.data.text_share) for steps in (step, step + 1))
        if self._text is None or before == after:
            return None
        return self._text.training_batch(before * self.window + place)

    def length(self, number: int) -> int:
        """Tokens of the samples of a batch."""
        shortest, longest = self.data.shortest, self.data.sequence_length
        if number < self.data.growth_batches:
            longest = round(shortest * (longest / shortest) ** (number / self.data.growth_batches))
        drawn = int(np.random.default_rng([self.data.seed, number]).integers(shortest, longest + 1))
        return _rounded(drawn)

    def _batch(self, number: int, rank: int) -> Batch:
        length = self.length(number)
        rows = max(1, self.data.batch_size * self.data.sequence_length // length)
        first = rank * rows
        samples = [
            self._mixed(np.random.default_rng([self.data.seed, number, row]), length)
            for row in range(first, first + rows)
        ]
        # No two rows of a run may share an id, and ids must not depend on the ranks: noise is keyed by them.
        return _collate(samples, first_row=(number << 32) + first)

    def _mixed(self, rng: np.random.Generator, length: int) -> tuple[Ids, Ids]:
        if rng.random() >= self.data.copy_share:
            try:
                return self._sample(rng, length)
            except ValueError:
                if not self.data.copy_share:
                    raise
        return copy_sample(rng, self._haystack(rng, length), length, self.writer.vocabulary)

    def _sample(self, rng: np.random.Generator, length: int) -> tuple[Ids, Ids]:
        return self.writer.sample(rng, self._haystack(rng, length), length)[:2]

    def _haystack(self, rng: np.random.Generator, length: int) -> Ids:
        """A run of text from anywhere."""
        tokens = self.shards.tokens[int(rng.choice(len(self._sizes), p=self._sizes / self._sizes.sum()))]
        begin = int(rng.integers(max(1, tokens.size - length)))
        return np.asarray(tokens[begin : begin + length], dtype=np.int64)


def _rounded(length: int) -> int:
    return max(_MULTIPLE, length - length % _MULTIPLE)


def _targets(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def _nothing(length: int) -> tuple[Ids, Ids]:
    return np.zeros(length, dtype=np.int64), np.full(length, IGNORE_INDEX, dtype=np.int64)


def _collate(samples: list[tuple[Ids, Ids]], first_row: int) -> Batch:
    """Samples of one length, each a document of its own."""
    input_ids = torch.from_numpy(np.stack([ids for ids, _ in samples]))
    rows, length = input_ids.shape
    return {
        "input_ids": input_ids,
        "labels": torch.from_numpy(np.stack([labels for _, labels in samples])),
        "document_ids": torch.ones_like(input_ids),
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        "row_ids": torch.arange(first_row, first_row + rows),
    }
