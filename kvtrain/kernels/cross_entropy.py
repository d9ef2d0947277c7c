"""Cross-entropy of a head without ever holding ``[tokens, vocabulary]`` logits."""

import torch
from torch import Tensor

from kvtrain.kernels.head import Head, logits_by, matmul_dtype, weight_of
from kvtrain.kernels.liger import LigerLinearCrossEntropy, takes_liger
from kvtrain.kernels.linear_loss import linear_loss_sum

IGNORE_INDEX = -100


def linear_cross_entropy_sum(
    hidden: Tensor, head: Head, targets: Tensor, *, chunk_size: int = 1024, backend: str = "auto"
) -> Tensor:
    """Summed next-token loss of a head's logits, differentiable in the hidden states and in all that the head has.

    Args:
        hidden: ``(N, D)``.
        head: Of the language model: its matrix ``(V, D)``, or the module.
        targets: ``(N,)`` token ids; ``-100`` counts nothing.
        chunk_size: Tokens whose logits exist at one time; Liger chooses by itself.
        backend: ``"auto"``, ``"liger"`` (of a matrix alone) or ``"torch"``.

    Raises:
        ValueError: There is not one target for each row of ``hidden``, or the backend cannot run this call.
    """
    _check_rows(hidden, targets)
    dtype, weight = matmul_dtype(hidden), weight_of(head)
    fast = takes_liger("cross-entropy", backend, hidden, *([] if weight is None else [weight]), fits=weight is not None)
    if weight is None or not fast:
        return linear_loss_sum(hidden, head, CrossEntropy(targets), chunk_size=chunk_size)
    _check_range(targets, weight.shape[0])
    if not torch.is_grad_enabled():  # an autograd function sees only what its inputs require
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = LigerLinearCrossEntropy.apply(hidden, weight, targets, dtype, IGNORE_INDEX)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def linear_token_losses(hidden: Tensor, head: Head, targets: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Loss of each token, ``(N,)`` in at least float32, without gradient; ignored targets get 0.

    Args:
        hidden: ``(N, D)``.
        head: Of the language model: its matrix ``(V, D)``, or the module.
        targets: ``(N,)`` token ids; ``-100`` counts nothing.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: There is not one target for each row of ``hidden``.
    """
    _check_rows(hidden, targets)
    logits = logits_by(head, hidden)
    losses = [
        _token_losses(logits(part), target)
        for part, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return torch.cat(losses)


def _check_rows(hidden: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} must be (N, D) and (N,)")


def _check_range(targets: Tensor, vocabulary: int) -> None:
    """Liger's kernel would write out of bounds where torch stops.

    Raises:
        ValueError: A target is no token.
    """
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != IGNORE_INDEX)
    if bool(wrong.any()):
        raise ValueError(
            f"targets must be {IGNORE_INDEX} or from 0 to {vocabulary - 1}; found {targets[wrong][0].item()}"
        )


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


class CrossEntropy:
    """Objective of ``linear_loss_sum``: cross-entropy with given targets."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def loss(self, logits: Tensor, rows: slice) -> Tensor:
        """Summed loss of a chunk."""
        return _token_losses(logits, self.targets[rows]).sum()

    def loss_and_gradient(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Summed loss of a chunk, and ``softmax - onehot``, zero where the target is ignored."""
        targets, gradient = self.targets[rows], torch.softmax(logits, -1)
        gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
        return self.loss(logits, rows), gradient.mul_((targets != IGNORE_INDEX).unsqueeze(-1))
