"""Feed-forward layers of which every token takes a few out of many: tokens sorted by expert, and a product for each.

The sums of a token depend on its own experts alone, in their order, and never on which other tokens came with it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.cpu_tiling import without_values_now
from kvtrain.kernels.dispatch import at_least_float32, autocast_off
from kvtrain.kernels.head import matmul_dtype
from kvtrain.kernels.mlp import swiglu


def experts_mlp(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    biases: tuple[Tensor, Tensor] | None = None,
    gate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Weighted sums of gated feed-forward layers, ``(N, D)``; under autocast products are in its type.

    Args:
        hidden: ``(N, D)``.
        chosen: ``(N, k)`` numbers of a token's experts.
        weights: ``(N, k)`` what each of them counts.
        gate_up: ``(E, 2 I, D)`` first the rows of gates, then those of what is gated; in any order that ``gate`` knows.
        down: ``(E, D, I)``. Matrices may be transposed views.
        biases: ``(E, 2 I)`` and ``(E, D)``, added to the two products.
        gate: From ``(..., 2 I)`` in at least float32 to ``(..., I)``; SwiGLU by default.
    """
    dtype, count = matmul_dtype(hidden), chosen.shape[1]
    bias_up, bias_down = biases or (None, None)
    with autocast_off(hidden):
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(len(down), device=experts.device), right=True)
        both = _linear(hidden.to(dtype)[order // count], gate_up, bias_up, experts, ends)
        gated = swiglu(*both.chunk(2, -1)) if gate is None else gate(at_least_float32(both)).to(dtype)
        fed = _linear(gated, down, bias_down, experts, ends) * weights.flatten()[order, None]
        result: Tensor = fed[order.argsort()].unflatten(0, chosen.shape).sum(1)
        return result.to(hidden.dtype)


def _linear(rows: Tensor, matrices: Tensor, bias: Tensor | None, experts: Tensor, ends: Tensor) -> Tensor:
    """As ``_products``, in the dtype of the rows, and a bias ``(E, out)`` added."""
    products = _products(rows, matrices.to(rows.dtype), experts, ends)
    return products if bias is None else products + bias.to(rows.dtype)[experts]


def _products(rows: Tensor, matrices: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    """Rows ``(S, in)`` of sorted ``experts (S,)`` by their matrices ``(E, out, in)``; ``ends (E,)`` of each expert."""
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:  # inductor knows no other groups
        return torch.bmm(matrices[experts], rows[:, :, None]).squeeze(2)
    if _has_grouped_mm(rows):
        return torch.nn.functional.grouped_mm(rows, matrices.transpose(1, 2), offs=ends.int())
    products: Tensor = _ProductsByExpert.apply(rows, matrices, _spans(ends, len(rows)))  # type: ignore[no-untyped-call]
    return products


def _has_grouped_mm(rows: Tensor) -> bool:
    if rows.dtype == torch.float64 or rows.device.type not in ("cpu", "cuda"):
        return False
    if without_values_now() and rows.dtype != torch.bfloat16:  # torch knows its sizes in this type alone
        return False
    return rows.device.type == "cpu" or torch.cuda.get_device_capability(rows.device) >= (8, 0)


def _spans(ends: Tensor, total: int) -> list[slice]:
    """Rows of every expert; about as many of each, where tensors have no values."""
    experts = len(ends)
    stops = [total * expert // experts for expert in range(1, experts + 1)] if without_values_now() else ends.tolist()
    return [slice(start, stop) for start, stop in pairwise([0, *stops])]


class _ProductsByExpert(torch.autograd.Function):
    """What ``grouped_mm`` does, one expert after the other, and holding no more."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, spans: list[slice]) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        ctx.spans = spans
        products = rows.new_empty(len(rows), matrices.shape[1])
        for span, matrix in zip(spans, matrices, strict=True):
            torch.mm(rows[span], matrix.T, out=products[span])
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, matrices = ctx.saved_tensors
        for_rows, for_matrices = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if for_rows else None
        grad_matrices = torch.empty_like(matrices) if for_matrices else None
        for expert, span in enumerate(ctx.spans):
            if grad_rows is not None:
                torch.mm(grad[span], matrices[expert], out=grad_rows[span])
            if grad_matrices is not None:
                torch.mm(grad[span].T, rows[span], out=grad_matrices[expert])
        return grad_rows, grad_matrices, None
