"""Root-mean-square normalization (Zhang & Sennrich 2019, eq. 4), computed in at least float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels import liger
from kvtrain.kernels.cpu_tiling import tiles
from kvtrain.kernels.dispatch import at_least_float32, wide_dtype


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, *, backend: str = "auto") -> Tensor:
    """``weight * hidden / rms(hidden)`` over the last axis, in the dtype of ``hidden``.

    Args:
        hidden: ``(..., D)``.
        weight: ``(D,)``.
        epsilon: Added to the mean square.
        backend: ``"auto"``, ``"liger"`` or ``"torch"``.

    Raises:
        ValueError: The backend cannot run this call.
    """
    if (liger.on_gpu(hidden) or backend != "auto") and liger.takes_liger("norm", backend, hidden, weight):
        normed: Tensor = liger.LigerRMSNorm.apply(hidden, weight, epsilon)  # type: ignore[no-untyped-call]
        return normed
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        result: Tensor = _RMSNorm.apply(hidden, weight, epsilon)  # type: ignore[no-untyped-call]
        return result
    wide = wide_dtype(hidden.dtype)
    return torch.nn.functional.rms_norm(hidden.to(wide), weight.shape, weight.to(wide), epsilon).to(hidden.dtype)


class _RMSNorm(torch.autograd.Function):
    """Torch's forward pass; its backward pass takes three times as long as this one on a CPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.epsilon = epsilon
        return rms_norm(hidden, weight, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        wide, channels = wide_dtype(hidden.dtype), hidden.shape[-1]
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype))
        for inputs, grads, results in tiles(hidden, grad, grad_hidden):
            inputs, grads = inputs.to(wide), grads.to(wide)
            mean_square = torch.linalg.vecdot(inputs, inputs).unsqueeze(-1).div_(channels)  # (n, 1)
            inverse = mean_square.add_(ctx.epsilon).rsqrt_()
            unit = inputs * inverse
            grad_weight += (grads * unit).sum(0)
            grads = grads * weight
            along = torch.linalg.vecdot(grads, unit).unsqueeze(-1).div_(channels)
            results.copy_(grads.sub_(unit * along).mul_(inverse))
        return grad_hidden, grad_weight.to(weight.dtype), None


def simple_rms_norm(hidden: Tensor, epsilon: float, *, epsilon_in_root: bool = False) -> Tensor:
    """``hidden / (rms(hidden) + epsilon)`` over the last axis, without weights, in the dtype of ``hidden``.

    Near zero its gradient is ``1 / epsilon`` times what comes in.

    Args:
        hidden: ``(..., D)``.
        epsilon: Added to the root of the mean square, or to the mean square.
        epsilon_in_root: Add it to the mean square.
    """
    wide = at_least_float32(hidden)
    if epsilon_in_root:
        return torch.nn.functional.rms_norm(wide, wide.shape[-1:], None, epsilon).to(hidden.dtype)
    rms: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
    return (wide / (rms + epsilon)).to(hidden.dtype)
