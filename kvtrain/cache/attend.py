"""Attention of new tokens over a store and over each other."""

import torch
from torch import Tensor

from kvtrain.cache.store import PagedStore
from kvtrain.kernels.attention import attention


def attend_store(
    query: Tensor, store: PagedStore, scale: float, *, hide_last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let every query see every slot of its row and head.

    Args:
        query: ``(B, H, n, D)``.
        store: Slots.
        scale: Factor on the scores.
        hide_last: ``(B, H_kv)`` heads whose last slot is out of sight.

    Returns:
        Output ``(B, H, n, D)`` and log-sum-exp ``(B, H, n)``.
    """
    keys, values, visible = store.gather()
    if hide_last is not None:
        slot = torch.arange(visible.shape[-1], device=visible.device)
        last = slot == (store.lengths - 1).unsqueeze(-1)
        visible = visible & ~(last & hide_last.unsqueeze(-1))
    bias = torch.zeros(visible.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    bias = bias.masked_fill(~visible, float("-inf"))
    return attention(query, keys, values, key_bias=bias, causal=False, scale=scale)
