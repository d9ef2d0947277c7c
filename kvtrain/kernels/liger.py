"""Liger's Triton kernels on CUDA: norm, gate, rotary embedding and the loss of a linear head.

Liger's own autograd functions write into tensors that their callers still hold: the rotary embedding into its input,
the gate's backward pass into gate and up projection, the loss into saved gradients, so that a second backward pass is
wrong in silence; and a gradient of a gradient is missing in silence. The functions here run the same kernels on
tensors of their own, and refuse the gradient of a gradient.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.dispatch import autocast_off, choose_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 65536  # a row is one block of Triton's


def takes_liger(operation: str, requested: str, *tensors: Tensor, fits: bool = True) -> bool:
    """Whether Liger's kernel runs a call, instead of torch; ``"auto"`` takes it wherever it can.

    Args:
        operation: Name for messages, such as ``"norm"``.
        requested: ``"auto"``, ``"liger"`` or ``"torch"``.
        *tensors: What the kernel reads, ``(..., D)``; it knows CUDA, half types and float32, and no empty tensors.
        fits: Whether the operation's own conditions hold.

    Raises:
        ValueError: Liger was asked for and is not installed, or the requested backend cannot run this call here.
    """
    if requested == "liger" and not _is_installed():
        raise ValueError(
            f"{operation}: backend 'liger' needs liger-kernel; use 'auto', or pip install 'kvtrain[liger]'"
        )
    can_run = fits and all(map(_runs_on, tensors)) and _is_installed()
    chosen: str = choose_backend(operation, requested, ("liger", "torch") if can_run else ("torch",))
    return chosen == "liger"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _runs_on(tensor: Tensor) -> bool:
    return on_gpu(tensor) and tensor.dtype in _DTYPES and tensor.numel() > 0 and tensor.shape[-1] <= _MAX_CHANNELS


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor lies where Liger's kernels run: asked before anything else, at every call."""
    return tensor.is_cuda


class LigerRMSNorm(torch.autograd.Function):
    """``kernels.norm.rms_norm``: computed in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """``(..., D)`` and ``(D,)``."""
        # "gemma" casts all to float32 first, "llama" would round before it multiplies; no offset, not in place.
        output: Tensor = _rms_norm().forward(ctx, hidden, weight, epsilon, 0.0, "gemma", False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both tensors."""
        grad_hidden, grad_weight = _rms_norm().backward(ctx, grad_output)[:2]
        return grad_hidden, grad_weight, None


def _rms_norm() -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction


class LigerSwiGLU(torch.autograd.Function):
    """``kernels.mlp.swiglu``; of half types ``silu(gate)`` is rounded before the product, as transformers does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Two tensors ``(..., D)`` of one dtype."""
        from liger_kernel.ops.swiglu import swiglu_forward

        ctx.save_for_backward(gate, up)
        output: Tensor = swiglu_forward(gate.contiguous(), up.contiguous())[-1]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both, written over copies of them."""
        from liger_kernel.ops.swiglu import swiglu_backward

        gate, up = (saved.clone(memory_format=torch.contiguous_format) for saved in ctx.saved_tensors)
        grad_gate, grad_up = swiglu_backward(gate, up, grad_output.contiguous())
        return grad_gate.view_as(grad_output), grad_up.view_as(grad_output)


class LigerRotary(torch.autograd.Function):
    """``kernels.rope.apply_rotary`` by angles whose second half repeats the first: the kernel reads the first alone."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``(B, H, T, D)``, and float32 angles ``(B or 1, T, D)``."""
        from liger_kernel.ops.rope import rope_forward

        ctx.save_for_backward(cos, sin)
        turned: Tensor = rope_forward(*_turnable(heads), cos, sin)[0]
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the heads: turned back."""
        from liger_kernel.ops.rope import rope_backward

        return rope_backward(*_turnable(grad_output), *ctx.saved_tensors)[0], None, None


def _turnable(heads: Tensor) -> tuple[Tensor, Tensor]:
    """A copy that the kernel may overwrite, and the second tensor that it wants to turn beside it, of one head."""
    copy = heads.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return copy.transpose(1, 2), torch.zeros_like(copy[:, :, :1]).transpose(1, 2)


class LigerLinearCrossEntropy(torch.autograd.Function):
    """``kernels.cross_entropy.linear_cross_entropy_sum``, its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, ignore_index: int
    ) -> Tensor:
        """``(N, D)``, ``(V, D)`` and ``(N,)``; logits are computed in ``dtype``, their softmax in float32."""
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        trains_hidden, trains_weight = ctx.needs_input_grad[:2]
        # Liger computes no gradient at all, not even the head's, unless hidden asks for one.
        part = hidden.detach().to(dtype).requires_grad_(trains_hidden or trains_weight)
        head = weight.detach().to(dtype).requires_grad_(trains_weight)
        with autocast_off(hidden):
            result = fused_linear_cross_entropy_forward(
                part, head, targets, ignore_index=ignore_index, reduction="sum", accum_dtype=torch.float32
            )
        grad_hidden, grad_weight = result[-3:-1]
        ctx.save_for_backward(grad_hidden if trains_hidden else None, grad_weight if trains_weight else None)
        ctx.dtypes = hidden.dtype, weight.dtype
        loss: Tensor = result[0]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and head, scaled out of place."""
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = (None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in pairs)
        return *grads, None, None, None
