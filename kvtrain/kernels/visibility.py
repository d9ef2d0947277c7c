"""Who sees whom: the masks that every attention backend shares."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Diagonal = Literal["plain", "open", "closed"]


class Visibility(NamedTuple):
    """Which keys a query may see; ``kernels.attention.attention`` explains the fields.

    Query ``i`` stands at key position ``i + T_k - T_q``: the last query sees the last key.
    """

    causal: bool = True
    diagonal: Diagonal = "plain"
    window: int | None = None
    sink: int = 0
    query_documents: Tensor | None = None  # (B, T_q)
    key_documents: Tensor | None = None  # (B, T_k)
    sinks: Tensor | None = None  # (B, T_k)

    def validate(self) -> None:
        """Refuse combinations that mean nothing.

        Raises:
            ValueError: Unknown diagonal, window below 1, negative sink, sinks said twice, a window or a diagonal
                without causality, or documents on one side alone.
        """
        if self.diagonal not in ("plain", "open", "closed"):
            raise ValueError(f"diagonal must be 'plain', 'open' or 'closed', not {self.diagonal!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), not {self.window}")
        if self.sink < 0:
            raise ValueError(f"sink must not be negative, not {self.sink}")
        if self.sink and self.sinks is not None:
            raise ValueError("give sink, the number of first keys, or sinks, a mask of them; not both")
        if not self.causal and (self.window is not None or self.diagonal != "plain"):
            raise ValueError("windows and open or closed diagonals need causal=True")
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError("give document ids for queries and keys, or for neither")


def visible_pairs(rows: Tensor, columns: Tensor, visibility: Visibility, sinks: Tensor | None = None) -> Tensor:
    """Which pairs are visible, documents aside.

    Args:
        rows: Positions of queries ``(T_q, 1)``.
        columns: Positions of keys ``(T_k,)``.
        visibility: The rules.
        sinks: ``(B, 1, T_k)``, where ``visibility.sinks`` says which of these keys are sinks.

    Returns:
        ``(T_q, T_k)``, or ``(B, T_q, T_k)`` with ``sinks`` and a window.
    """
    if not visibility.causal:
        return torch.ones_like(rows == columns)
    visible = columns < rows if visibility.diagonal == "closed" else columns <= rows
    if visibility.window is not None:
        kept = columns < visibility.sink if sinks is None else sinks
        visible = visible & ((rows - columns < visibility.window) | kept)
    return visible


def log_sum_exp(scores: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` whose gradient is 0, not NaN, where every entry is ``-inf``."""
    empty = (scores == float("-inf")).all(dim, keepdim=True)
    return torch.logsumexp(scores.masked_fill(empty, 0.0), dim).masked_fill(empty.squeeze(dim), float("-inf"))


def finite(lse: Tensor) -> Tensor:
    """Log-sum-exp with ``-inf`` (no visible key) replaced, so that ``exp(-inf - lse)`` is 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
