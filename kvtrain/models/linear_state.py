"""Linear attention as models serve it: over a state of constant size a row, by the token or in chunks."""

from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement, bookkeeping
from kvtrain.cache.state import StateStore
from kvtrain.kernels.linear_attention import linear_attention, linear_attention_step


class LinearStateLayer(KVCacheLayer):
    """Sums of key-value products ``(H, D, D)`` of one linear layer, in at least float32.

    Half precision would lose tokens: at 8,192 of them a bfloat16 state is 3 to 10 % off.

    Args:
        num_heads: Heads, H.
        head_dim: Channels of a head, D.
        placement: Where tensors lie.
    """

    def __init__(self, num_heads: int, head_dim: int, placement: Placement) -> None:
        dtype = torch.promote_types(placement.dtype, torch.float32)
        self.sums = StateStore({"state": ((num_heads, head_dim, head_dim), dtype)}, placement)
        super().__init__(self.sums)

    @property
    def state(self) -> Tensor:
        """``(B, H, D, D)``."""
        return self.sums["state"]

    @state.setter
    def state(self, value: Tensor) -> None:
        self.sums["state"] = value

    def kv_tokens(self) -> Tensor:
        """Keys with values, in the cache's dtype, that would take the state's bytes."""
        rows, heads, head_dim, _ = self.state.shape
        pair = 2 * head_dim * self.sums.placement.dtype.itemsize
        return torch.full((rows, heads), self.state[:1, :1].nbytes // pair if rows else 0, device=self.state.device)


@bookkeeping
def attend_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: LinearStateLayer,
    *,
    slopes: Tensor | None,
    valid: Tensor | None,
    documents: dict[str, Any],
) -> Tensor:
    """New tokens over the state before them, which takes them up: one by the recurrence, many by chunks.

    Args:
        query: ``(B, H, n, D)``.
        key: ``(B, H, n, D)``.
        value: ``(B, H, n, D)``.
        layer: Whose state it is.
        slopes: ``(H,)``, as ``linear_attention`` takes them.
        valid: ``(B, n)`` real tokens; None where all are.
        documents: What ``linear_attention`` must know of padding among several tokens; empty where there is none.

    Returns:
        ``(B, H, n, D)``.
    """
    learns = torch.is_grad_enabled()
    state = layer.state.clone() if learns else layer.state  # which is written before a backward pass comes
    if query.shape[2] == 1:
        settings: dict[str, Any] = {"slopes": slopes, "valid": valid, "in_place": not learns}
        output, layer.state = linear_attention_step(query, key, value, state, **settings)
    else:
        output, layer.state = linear_attention(query, key, value, slopes=slopes, **documents, state=state)
    return output
