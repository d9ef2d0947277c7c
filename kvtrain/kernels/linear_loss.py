"""Losses of a head, in chunks: ``[tokens, vocabulary]`` logits never exist.

The loss is a scalar, so its gradients in a matrix are computed in the forward pass, while a chunk's logits are there.
A head that is a module is left to autograd, and its logits are made again in the backward pass.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kvtrain.kernels.cpu_tiling import spans
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.head import Head, logits_by, matmul_dtype, weight_of


class Objective(Protocol):
    """A sum over tokens of a loss of their logits."""

    def loss(self, logits: Tensor, rows: slice) -> Tensor:
        """Summed loss of a chunk, from its logits ``(n, V)`` in at least float32; differentiable."""

    def loss_and_gradient(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The same without a graph, and its gradient with respect to the logits, a new ``(n, V)``."""


class WeightedSum:
    """An objective of several, which share a chunk's logits.

    Args:
        terms: Factor and objective of each.

    Attributes:
        sums: What each objective came to so far, without its factor.
    """

    def __init__(self, *terms: tuple[float, Objective]) -> None:
        self.terms = terms
        self.sums = [torch.zeros(()) for _ in terms]

    def loss(self, logits: Tensor, rows: slice) -> Tensor:
        """Weighted sum of the objectives' losses."""
        return self._add([objective.loss(logits, rows) for _, objective in self.terms])

    def loss_and_gradient(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Weighted sums of the objectives' losses and gradients."""
        losses, gradient = [], torch.zeros_like(logits)
        for factor, objective in self.terms:
            loss, part = objective.loss_and_gradient(logits, rows)
            losses.append(loss)
            gradient.add_(part, alpha=factor)
        return self._add(losses), gradient

    def _add(self, losses: list[Tensor]) -> Tensor:
        self.sums = [total + loss.detach() for total, loss in zip(self.sums, losses, strict=True)]
        return torch.stack([factor * loss for (factor, _), loss in zip(self.terms, losses, strict=True)]).sum()


def linear_loss_sum(hidden: Tensor, head: Head, objective: Objective, *, chunk_size: int = 1024) -> Tensor:
    """Sum an objective over the logits of a head; differentiable in the hidden states and in all that the head has.

    Args:
        hidden: ``(N, D)``.
        head: The matrix ``(V, D)``, or a module.
        objective: What is summed.
        chunk_size: Tokens whose logits exist at one time.
    """
    weight = weight_of(head)
    if weight is None:
        return _module_loss_sum(hidden, head, objective, chunk_size)
    if not torch.is_grad_enabled():  # an autograd function sees only what its inputs require
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearLossSum.apply(hidden, weight, objective, matmul_dtype(hidden), chunk_size)  # type: ignore[no-untyped-call]
    return loss


def _module_loss_sum(hidden: Tensor, head: Head, objective: Objective, chunk_size: int) -> Tensor:
    """By autograd; the arguments are those of ``linear_loss_sum``."""
    logits = logits_by(head, hidden)

    def chunk_loss(part: Tensor, rows: slice) -> Tensor:
        return objective.loss(logits(part), rows)

    loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for number, part in enumerate(hidden.split(chunk_size)):
        rows = slice(number * chunk_size, (number + 1) * chunk_size)
        loss = loss + checkpoint(chunk_loss, part, rows, use_reentrant=False)
    return loss


class _LinearLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, objective: Objective, dtype: torch.dtype, chunk_size: int
    ) -> Tensor:
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(at_least_float32(weight)) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for rows in spans(len(hidden), chunk_size):
            part = hidden[rows].to(dtype)
            logits = at_least_float32(part @ head.T)
            if grad_hidden is None and grad_weight is None:
                loss += objective.loss(logits, rows)
                continue
            value, grad_logits = objective.loss_and_gradient(logits, rows)
            loss, grad_logits = loss + value, grad_logits.to(dtype)
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
