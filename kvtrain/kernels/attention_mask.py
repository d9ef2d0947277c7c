"""Which keys a query sees, and which of them the key bias touches: the mask that every attention backend shares."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.documents import Documents


class AttentionMask(NamedTuple):
    """Which keys a query sees, and which its bias touches; ``kernels.attention.attention`` explains the fields.

    Query ``i`` stands at key position ``i + T_k - T_q``: the last query sees the last key.
    """

    causal: bool = True
    strict: bool = False
    bias_after: int = 0
    window: int | None = None
    sink: int = 0
    documents: Documents | None = None
    sinks: Tensor | None = None  # (B, T_k)

    def validated(self) -> "AttentionMask":
        """Itself; combinations that mean nothing are refused.

        Raises:
            ValueError: Window below 1, negative sink or ``bias_after``, sinks said twice, or a window, ``strict`` or
                ``bias_after`` without causality.
        """
        if self.bias_after < 0:
            raise ValueError(f"bias_after must not be negative (0: every key's bias counts), not {self.bias_after}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), not {self.window}")
        if self.sink < 0:
            raise ValueError(f"sink must not be negative, not {self.sink}")
        if self.sink and self.sinks is not None:
            raise ValueError("give sink, the number of first keys, or sinks, a mask of them; not both")
        if not self.causal and (self.window is not None or self.strict or self.bias_after):
            raise ValueError("window, strict and bias_after count back from the token itself: they need causal=True")
        return self


def visible_pairs(rows: Tensor, columns: Tensor, mask: AttentionMask, sinks: Tensor | None = None) -> Tensor:
    """Which pairs are visible, documents aside.

    Args:
        rows: Positions of queries ``(T_q, 1)``.
        columns: Positions of keys ``(T_k,)``.
        mask: The rules.
        sinks: ``(B, 1, T_k)``, where ``mask.sinks`` says which of these keys are sinks.

    Returns:
        ``(T_q, T_k)``, or ``(B, T_q, T_k)`` with ``sinks`` and a window.
    """
    if not mask.causal:
        return torch.ones_like(rows == columns)
    visible = columns < rows if mask.strict else columns <= rows
    if mask.window is not None:
        kept = columns < mask.sink if sinks is None else sinks
        visible = visible & ((rows - columns < mask.window) | kept)
    return visible


def biased_pairs(rows: Tensor, columns: Tensor, mask: AttentionMask) -> Tensor:
    """In which of the visible pairs the key's bias counts, ``(T_q, T_k)``; arguments as in ``visible_pairs``."""
    return rows - columns >= mask.bias_after


def log_sum_exp(scores: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` whose gradient is 0, not NaN, where every entry is ``-inf``."""
    empty = (scores == float("-inf")).all(dim, keepdim=True)
    return torch.logsumexp(scores.masked_fill(empty, 0.0), dim).masked_fill(empty.squeeze(dim), float("-inf"))


def finite(lse: Tensor) -> Tensor:
    """Log-sum-exp with ``-inf`` (no visible key) replaced, so that ``exp(-inf - lse)`` is 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
