"""The pull towards a compression target."""

from collections.abc import Iterable

import torch
from torch import Tensor


def merged_fraction(decisions: Iterable[Tensor], counted: Tensor) -> Tensor:
    """Share of each row's tokens that decide to merge, over all layers and heads, ``(B,)``.

    Args:
        decisions: ``(B, H_kv, T)`` of every layer.
        counted: ``(B, T)`` tokens that had a choice, from ``free_to_merge``.
    """
    total = torch.stack([layer.mean(1) for layer in decisions]).mean(0)  # (B, T)
    return (total * counted).sum(1) / counted.sum(1).clamp(min=1)


def free_to_merge(document_ids: Tensor) -> Tensor:
    """Tokens ``(B, T)`` that have a choice: neither padding, which is document 0, nor a document's first."""
    free = document_ids > 0
    free[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    free[:, 0] = False
    return free


def compression_hinge(fractions: Tensor, compression: float) -> Tensor:
    """One-sided hinge, per row, averaged over rows (Nawrot et al. 2024, eq. 6; released code).

    A row that merges more than ``1 - 1 / compression`` of its tokens costs nothing.

    Args:
        fractions: ``(B,)`` from ``merged_fraction``.
        compression: Target, tokens per slot.
    """
    return torch.relu(1.0 - 1.0 / compression - fractions).mean()
