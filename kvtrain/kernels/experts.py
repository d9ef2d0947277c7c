"""Feed-forward layers of which every token takes a few out of many: tokens sorted by expert, and a product for each.

The sums of a token depend on its own experts alone, in their order, and never on which other tokens came with it.
"""

import torch
from torch import Tensor

from kvtrain.kernels.cpu_tiling import without_values_now
from kvtrain.kernels.dispatch import autocast_off
from kvtrain.kernels.head import matmul_dtype
from kvtrain.kernels.mlp import swiglu


def experts_mlp(hidden: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weighted sums of gated feed-forward layers, ``(N, D)``; under autocast products are in its type.

    Args:
        hidden: ``(N, D)``.
        chosen: ``(N, k)`` numbers of a token's experts.
        weights: ``(N, k)`` what each of them counts.
        gate_up: ``(E, 2 I, D)`` first the rows of gates, then those of what is gated.
        down: ``(E, D, I)``.
    """
    dtype, count = matmul_dtype(hidden), chosen.shape[1]
    with autocast_off(hidden):
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(len(down), device=experts.device), right=True)
        gate, up = _products(hidden.to(dtype)[order // count], gate_up.to(dtype), experts, ends).chunk(2, -1)
        fed = _products(swiglu(gate, up), down.to(dtype), experts, ends) * weights.flatten()[order, None]
        result: Tensor = fed[order.argsort()].unflatten(0, chosen.shape).sum(1)
        return result.to(hidden.dtype)


def _products(rows: Tensor, matrices: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    """Rows ``(S, in)`` of sorted ``experts (S,)`` by their matrices ``(E, out, in)``; ``ends (E,)`` of each expert."""
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:  # inductor knows no other groups
        return torch.bmm(matrices[experts], rows[:, :, None]).squeeze(2)
    if _has_grouped_mm(rows):
        return torch.nn.functional.grouped_mm(rows, matrices.transpose(1, 2), offs=ends.int())
    spans = rows.split(_sizes(ends, len(rows)))
    return torch.cat([span @ matrix.T for span, matrix in zip(spans, matrices.unbind(), strict=True)])


def _has_grouped_mm(rows: Tensor) -> bool:
    if rows.dtype == torch.float64 or rows.device.type not in ("cpu", "cuda"):
        return False
    return rows.device.type == "cpu" or torch.cuda.get_device_capability(rows.device) >= (8, 0)


def _sizes(ends: Tensor, total: int) -> list[int]:
    """Rows of every expert; about as many of each, where tensors have no values."""
    experts = len(ends)
    if without_values_now():
        return [total * (expert + 1) // experts - total * expert // experts for expert in range(experts)]
    return ends.diff(prepend=ends.new_zeros(1)).tolist()
