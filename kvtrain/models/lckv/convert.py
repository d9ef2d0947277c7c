"""Weights and settings from elsewhere: a host's weights as this method wants them, and published checkpoints."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtrain.models.lckv.attention import absent_parts, no_residual, residual_parts
from kvtrain.models.lckv.kv_map import KVMap

if TYPE_CHECKING:
    from kvtrain.models.lckv.config import LCKV


def adapt_state(settings: "LCKV", state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A host's state without the projections that nobody reads, and with what the method adds.

    Args:
        settings: The method; ``init="mean"`` gives every owner the mean of its readers' projections.
        state: The host's, by name.
        depth: Its layers.
    """
    adapted = dict(state)
    if settings.init == "mean":
        keys, values = settings.maps(depth)
        adapted |= _means(state, keys, "k_proj") | _means(state, values, "v_proj")
    for layer_idx in range(depth):
        prefix = _attention(layer_idx)
        parts = tuple(f"{prefix}{name}." for name in absent_parts(layer_idx, settings, depth))
        adapted = {name: tensor for name, tensor in adapted.items() if not name.startswith(parts)}
        like = state[f"{prefix}q_proj.weight"]
        for name in residual_parts(layer_idx, settings, depth):
            adapted[prefix + name] = torch.nn.Parameter(no_residual().to(like))
    return adapted


def _attention(layer_idx: int) -> str:
    return f"model.layers.{layer_idx}.self_attn."


def _means(state: dict[str, Tensor], kv_map: KVMap, projection: str) -> dict[str, Tensor]:
    """Weights and biases of every owner's projection, averaged over the layers that read it."""
    means: dict[str, Tensor] = {}
    for owner in kv_map.owners:
        readers = [_attention(reader) + projection for reader in kv_map.readers(owner)]
        for kind in ("weight", "bias"):
            if len(readers) > 1 and f"{readers[0]}.{kind}" in state:
                stacked = torch.stack([state[f"{reader}.{kind}"].detach().double() for reader in readers])
                mean = stacked.mean(0).to(state[f"{readers[0]}.{kind}"].dtype)
                means[f"{_attention(owner)}{projection}.{kind}"] = torch.nn.Parameter(mean)
    return means
