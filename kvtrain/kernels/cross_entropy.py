"""Cross-entropy of a linear head without ever holding ``[tokens, vocabulary]`` logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.dispatch import at_least_float32

IGNORE_INDEX = -100


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Summed next-token loss of ``softmax(hidden @ weight.T)``, differentiable in both factors.

    The gradients are computed in the forward pass, chunk by chunk, because the loss is a scalar.

    Args:
        hidden: ``(N, D)``.
        weight: ``(V, D)``, the rows of the language-model head.
        targets: ``(N,)`` token ids; ``-100`` counts nothing.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: There is not one target for each row of ``hidden``.
    """
    _check_rows(hidden, targets)
    loss: Tensor = _LinearCrossEntropySum.apply(hidden, weight, targets, _matmul_dtype(hidden), chunk_size)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def linear_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Loss of each token, ``(N,)`` in at least float32, without gradient; ignored targets get 0.

    Args:
        hidden: ``(N, D)``.
        weight: ``(V, D)``, the rows of the language-model head.
        targets: ``(N,)`` token ids; ``-100`` counts nothing.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: There is not one target for each row of ``hidden``.
    """
    _check_rows(hidden, targets)
    dtype = _matmul_dtype(hidden)
    head = weight.to(dtype)
    losses = [
        _token_losses(at_least_float32(part.to(dtype) @ head.T), target)
        for part, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return torch.cat(losses)


def _check_rows(hidden: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} must be (N, D) and (N,)")


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """What autocast would multiply in; an autograd function does not see it by itself."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk_size: int
    ) -> Tensor:
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(at_least_float32(weight)) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            part = hidden[rows].to(dtype)
            logits = at_least_float32(part @ head.T)
            loss += _token_losses(logits, targets[rows]).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = _logits_gradient(logits, targets[rows]).to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head
            if grad_weight is not None:
                grad_weight += grad_logits.T @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else (grad * grad_loss).to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None


def _logits_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """``softmax - onehot``, zero where the target is ignored; overwrites ``logits``."""
    gradient = torch.softmax(logits, -1)
    counted = targets != IGNORE_INDEX
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
    return gradient.mul_(counted.unsqueeze(-1))
