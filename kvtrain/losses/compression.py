"""The pull towards a compression target."""

from collections.abc import Iterable

import torch
from torch import Tensor


def compressed_fraction(decisions: Iterable[Tensor], counted: Tensor) -> Tensor:
    """Share of each row's tokens that decide to take no slot of their own, over all layers and heads, ``(B,)``.

    Args:
        decisions: ``(B, H_kv, T)`` of every layer.
        counted: ``(B, T)`` tokens that had a choice.
    """
    total = torch.stack([layer.mean(1) for layer in decisions]).mean(0)  # (B, T)
    return (total * counted).sum(1) / counted.sum(1).clamp(min=1)


def tokens_per_slot(fraction: Tensor) -> Tensor:
    """Compression where so large a share of the tokens takes no slot of its own."""
    return 1.0 / (1.0 - fraction)


def compression_hinge(fractions: Tensor, compression: float) -> Tensor:
    """One-sided hinge, per row, averaged over rows (Nawrot et al. 2024, eq. 6; released code).

    A row of which more than ``1 - 1 / compression`` is compressed costs nothing.

    Args:
        fractions: ``(B,)`` from ``compressed_fraction``.
        compression: Target, tokens per slot.
    """
    return torch.relu(1.0 - 1.0 / compression - fractions).mean()
