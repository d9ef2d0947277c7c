"""The gates of feed-forward layers with two inputs: SwiGLU, and GEGLU with GELU's tanh form (Shazeer 2020, eq. 6)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels import liger
from kvtrain.kernels.cpu_tiling import tiles
from kvtrain.kernels.dispatch import wide_dtype


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``, element by element, computed in at least float32.

    Liger rounds ``silu(gate)`` to a half type before the product, as transformers does; torch rounds once.

    Args:
        gate: ``(..., D)`` before the activation.
        up: ``(..., D)``.
        backend: ``"auto"``, ``"liger"`` or ``"torch"``.

    Raises:
        ValueError: The backend cannot run this call.
    """
    fits = gate.shape == up.shape and gate.dtype == up.dtype
    if (liger.on_gpu(gate) or backend != "auto") and liger.takes_liger("gate", backend, gate, up, fits=fits):
        gated: Tensor = liger.LigerSwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return gated
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up``, element by element, computed in at least float32; GELU by its form with tanh.

    Args:
        gate: ``(..., D)`` before the activation.
        up: ``(..., D)``.
    """
    return _gated(gate, up, "gelu")


def _gelu(gate: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh")


def _gelu_backward(grad: Tensor, gate: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")
    return result


# By name the activation, and from a gradient and the gate the gate's gradient.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (torch.nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu": (_gelu, _gelu_backward),
}


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    learns = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if not learns and gate.dtype == up.dtype == wide_dtype(gate.dtype):  # no wide copies, so no slices either
        return _ACTIVATIONS[activation][0](gate) * up
    result: Tensor = _Gate.apply(*torch.broadcast_tensors(gate, up), activation)  # type: ignore[no-untyped-call]
    return result


class _Gate(torch.autograd.Function):
    """Keeps gate and up as they came; wide copies of them live for a slice."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        activate, _ = _ACTIVATIONS[activation]
        result, wide = torch.empty_like(up, memory_format=torch.contiguous_format), wide_dtype(gate.dtype)
        for gates, ups, results in tiles(gate, up, result):
            results.copy_(activate(gates.to(wide)) * ups)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        activate, backward = _ACTIVATIONS[ctx.activation]
        grad_gate, wide = torch.empty_like(gate, memory_format=torch.contiguous_format), wide_dtype(gate.dtype)
        grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
        for gates, ups, grads, grad_gates, grad_ups in tiles(gate, up, grad, grad_gate, grad_up):
            gates, grads = gates.to(wide), grads.to(wide)
            grad_ups.copy_(activate(gates) * grads)
            grad_gates.copy_(backward(grads * ups, gates))
        return grad_gate, grad_up, None
