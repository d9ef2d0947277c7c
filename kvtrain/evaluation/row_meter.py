"""What each row of a cache holds while a model answers it, whatever rows are beside it and how long they answer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.evaluation.answering import AnsweringBytes
from kvtrain.models.cache_size import row_bytes
from kvtrain.models.full import Full


@dataclass(frozen=True)
class RowFigures(AnsweringBytes):
    """What rows hold while their answers are predicted: the cache that each token of an answer is predicted from.

    Batches make no difference but for the list of a row's pages, as wide as that of the longest row beside it.

    Attributes:
        kept_tokens: Slots of a head where the last token is predicted, in the mean over heads, layers and rows.
        compression: Tokens read by then for each of these slots.
    """

    kept_tokens: float
    compression: float


class RowMeter:
    """Sums over rows; a ``RowWatch`` for each batch of them.

    Args:
        model: From ``open_model``.
    """

    def __init__(self, model: Any) -> None:
        host = getattr(model.config, "host_config", None)
        self._full: Callable[[int], int] | None = None
        if host is not None:
            self._full = functools.cache(row_bytes(host, Full(), model.dtype))
        self.rows = self.looks = self.tokens = 0
        self.held = self.end = self.peak = self.full_held = self.full_end = 0
        self.kept = 0.0

    def watch(self, peak: Tensor | None = None) -> "RowWatch":
        """Begin with some rows.

        Args:
            peak: ``(B,)`` bytes, the most that they have held so far; None: nothing.
        """
        return RowWatch(self, peak)

    def full_bytes(self, tokens: Tensor) -> Tensor:
        """What ``Full`` would hold of rows of so many tokens, ``(B,)``; zeros for a model without a host."""
        return torch.tensor([0 if self._full is None else self._full(count) for count in tokens.tolist()])

    def result(self) -> RowFigures | None:
        """Over all rows; None where there were none."""
        if not self.rows:
            return None
        pairs = ((self.held, self.full_held), (self.end, self.full_end), (self.peak, self.full_end))
        mean, end, peak = (held / full if full else None for held, full in pairs)
        return RowFigures(
            kv_bytes_mean=self.held / self.looks,
            kv_bytes_end=self.end / self.rows,
            kv_bytes_peak=self.peak / self.rows,
            kv_share_mean=mean,
            kv_share_end=end,
            kv_share_peak=peak,
            kept_tokens=self.kept / self.rows,
            compression=self.tokens / self.kept,
        )


class RowWatch:
    """Looks at the rows of one batch, from their prompts to their last answers.

    Args:
        meter: Takes the sums.
        peak: ``(B,)`` bytes, the most that the rows have held so far; None: nothing.
    """

    def __init__(self, meter: RowMeter, peak: Tensor | None) -> None:
        self._meter, self.peak = meter, peak
        self._end: Tensor | None = None  # (B, 4) of each row's latest prediction: bytes, Full's bytes, tokens, slots

    def look(self, cache: KVCache, answering: Tensor | None = None) -> None:
        """Look at all rows.

        Args:
            cache: Theirs.
            answering: Rows ``(B,)`` bool of which a token of the answer is predicted now; None: none.
        """
        held = cache.row_bytes()
        self.peak = held if self.peak is None else torch.maximum(self.peak, held)
        if answering is None or not bool(answering.any()):
            return
        tokens, answering = cache.tokens.cpu(), answering.cpu()
        full = self._meter.full_bytes(tokens)
        now = torch.stack([held.double(), full.double(), tokens.double(), cache.mean_kv_tokens().cpu()], 1)
        self._end = now if self._end is None else torch.where(answering[:, None], now, self._end)
        self._meter.looks += int(answering.sum())
        self._meter.held += int(held[answering].sum())
        self._meter.full_held += int(full[answering].sum())

    def close(self) -> None:
        """All rows have been answered."""
        assert self._end is not None and self.peak is not None
        held, full, tokens, slots = self._end.sum(0).tolist()
        self._meter.rows += len(self._end)
        self._meter.end += int(held)
        self._meter.full_end += int(full)
        self._meter.tokens += int(tokens)
        self._meter.kept += slots
        self._meter.peak += int(self.peak.sum())
