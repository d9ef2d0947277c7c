"""Perplexity through the cache that serves: every window is fed into a cache of its own, a stretch at a time."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kvtrain.evaluation.answering import refuse_uncut
from kvtrain.evaluation.windows import Window, corpus_windows
from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_token_losses

_BATCH = 8
_BUCKETS = 16  # at most


@dataclass(frozen=True)
class PositionBucket:
    """Predictions made after nearly as many tokens of their window.

    Attributes:
        position: Tokens read where the bucket ends; it begins where the one before ends.
        loss: Mean over its targets, nats.
        perplexity: ``exp`` of it.
        targets: Tokens predicted.
        kept: Slots at the bucket's end, mean over layers, heads and the windows that reach it; None where none does.
    """

    position: int
    loss: float
    perplexity: float
    targets: int
    kept: float | None


@dataclass(frozen=True)
class PerplexityResult:
    """What a corpus costs a model.

    Attributes:
        perplexity: ``exp`` of the mean loss of a target.
        bits_per_byte: Of the targets' text.
        tokens: Targets.
        compression: Tokens per kept slot, as total tokens over mean slots.
        kv_bytes_per_1024: Bytes allocated for 1,024 tokens of one row, spare pages aside, measured on full
            windows; None where no window is full.
        by_position: The same losses by the place of the prediction in its window; buckets without a target are absent.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    compression: float
    kv_bytes_per_1024: float | None
    by_position: list[PositionBucket]


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    corpus: str,
    *,
    sequence_length: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    chunk: int | None = None,
) -> PerplexityResult:
    """Measure a model on a corpus, document by document, in sliding windows.

    Args:
        model: From ``open_model``.
        tokenizer: Its tokenizer.
        corpus: See ``kvtrain.data.corpus.read_corpus``.
        sequence_length: Tokens in a window, its start token included.
        stride: Tokens from one window to the next. Those are what a window scores, at its end; the rest is context.
            A document's first window scores all. None leaves no overlap.
        limit: Windows to read; None reads all.
        chunk: Tokens fed at a time; 1 decodes. None feeds a position bucket (a sixteenth of a window), and more
            than that is never fed at once. The figures do not depend on it, with one exception: where layers
            iterate, decoding is exact and reading a prompt is not quite.

    Raises:
        ValueError: The corpus cannot be read or holds no text, a length is out of range, or nothing is decoded of a
            model that cuts prompts when they end.
    """
    refuse_uncut(model, chunk)
    _check(sequence_length, sequence_length if stride is None else stride, chunk)
    windows = list(islice(corpus_windows(tokenizer, corpus, sequence_length, stride or sequence_length), limit))
    if not windows:
        raise ValueError(f"{corpus}: the corpus is empty: no document holds any text")
    tally = _Tally(sequence_length)
    for batch in _batches(windows):
        _feed(model, batch, tokenizer.pad_token_id or 0, chunk or sequence_length, tally)
    return tally.result(sum(window.num_bytes for window in windows))


def _check(sequence_length: int, stride: int, chunk: int | None) -> None:
    if sequence_length < 2:
        raise ValueError(f"a sequence length of {sequence_length} leaves nothing to predict; use 2 or more")
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"a stride of {stride} skips text or stands still; use 1 to {sequence_length}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens feeds nothing; use 1 or more")


def _batches(windows: list[Window]) -> Iterable[list[Window]]:
    """Groups of windows of similar length, the longest first."""
    ordered = sorted(windows, key=lambda window: -len(window.ids))
    full = [window for window in ordered if len(window.ids) == len(ordered[0].ids)]
    rest = ordered[len(full) :]
    for group in (full, rest):
        for begin in range(0, len(group), _BATCH):
            yield group[begin : begin + _BATCH]


def _pad(windows: list[Window], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask, and the token that each one predicts, so that a column is a position."""
    length = max(len(window.ids) for window in windows)
    ids = torch.full((len(windows), length), padding)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (tokens, first, _) in enumerate(windows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        targets[row, first - 1 : len(tokens) - 1] = torch.tensor(tokens[first:])
    return ids, mask, targets


def _feed(model: Any, batch: list[Window], padding: int, chunk: int, tally: "_Tally") -> None:
    """Read a batch of windows into a cache, and look at the cache wherever a bucket ends."""
    ids, mask, targets = (tensor.to(model.device) for tensor in _pad(batch, padding))
    cache, head = model.make_cache(), model.get_output_embeddings()
    for bucket, begin, end in tally.spans(ids.shape[1]):
        for first in range(begin, end, chunk):
            columns = slice(first, min(first + chunk, end))
            kwargs = {"attention_mask": mask[:, columns], "past_key_values": cache, "prefill": chunk > 1}
            decoded = model.get_decoder()(ids[:, columns], **kwargs)
            hidden, wanted = decoded.last_hidden_state.flatten(0, 1), targets[:, columns].flatten()
            tally.losses[bucket] += linear_token_losses(hidden, head, wanted).double().sum().item()
            tally.targets[bucket] += int((wanted != IGNORE_INDEX).sum())
        tally.look(bucket, cache.mean_kv_tokens()[mask.sum(1) >= tally.ends[bucket]])
    tally.close([len(window.ids) for window in batch], cache.mean_kv_tokens(), cache.kv_bytes() - cache.free_bytes())


class _Tally:
    """Sums over windows, by bucket of positions."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length, self.width = sequence_length, -(-sequence_length // _BUCKETS)
        starts = range(0, sequence_length, self.width)
        self.ends = [min(start + self.width, sequence_length) for start in starts]
        self.losses, self.kept = [0.0] * len(starts), [0.0] * len(starts)
        self.targets, self.reached = [0] * len(starts), [0] * len(starts)
        self.seen = self.full_rows = self.full_bytes = 0
        self.slots = 0.0

    def spans(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Every bucket that ``length`` columns touch, with its columns."""
        for bucket, begin in enumerate(range(0, length, self.width)):
            yield bucket, begin, min(begin + self.width, length)

    def look(self, bucket: int, slots: Tensor) -> None:
        """Take in the rows that have reached a bucket's end."""
        self.kept[bucket] += slots.sum().item()
        self.reached[bucket] += len(slots)

    def close(self, lengths: list[int], slots: Tensor, num_bytes: int) -> None:
        """Take in the cache of a whole batch of windows."""
        self.seen += sum(lengths)
        self.slots += slots.sum().item()
        if min(lengths) == self.sequence_length:
            self.full_rows += len(lengths)
            self.full_bytes += num_bytes

    def result(self, num_bytes: int) -> PerplexityResult:
        """The figures, with the bytes of the targets' text."""
        loss, targets = sum(self.losses), sum(self.targets)
        per_token = self.full_bytes / self.full_rows / self.sequence_length if self.full_rows else None
        return PerplexityResult(
            perplexity=perplexity_of(loss / targets),
            bits_per_byte=loss / math.log(2) / num_bytes,
            tokens=targets,
            compression=self.seen / self.slots,
            kv_bytes_per_1024=None if per_token is None else per_token * 1024,
            by_position=[self._bucket(bucket) for bucket, count in enumerate(self.targets) if count],
        )

    def _bucket(self, bucket: int) -> PositionBucket:
        loss, reached = self.losses[bucket] / self.targets[bucket], self.reached[bucket]
        kept = self.kept[bucket] / reached if reached else None
        return PositionBucket(self.ends[bucket], loss, perplexity_of(loss), self.targets[bucket], kept)


def perplexity_of(loss: float) -> float:
    """``exp`` of a mean loss, which ends in infinity."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()
