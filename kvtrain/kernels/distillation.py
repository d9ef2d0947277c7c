"""Distillation from a teacher's logits without ever holding ``[tokens, vocabulary]`` of either model."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.linear_loss import linear_loss_sum, matmul_dtype


class TeacherHead(NamedTuple):
    """Where a teacher's logits come from: ``hidden @ weight.T``.

    Attributes:
        hidden: ``(N, D_t)``, or ``(B, T, D_t)`` on its way there.
        weight: ``(V, D_t)``.
    """

    hidden: Tensor
    weight: Tensor


def linear_kl_sum(
    hidden: Tensor, weight: Tensor, teacher: TeacherHead, counted: Tensor, *, chunk_size: int = 1024
) -> Tensor:
    """Summed ``KL(teacher || student)`` over the vocabulary, differentiable in the student's two factors.

    Args:
        hidden: The student's, ``(N, D)``.
        weight: The student's head, ``(V, D)``.
        teacher: The teacher's, without gradient.
        counted: ``(N,)`` tokens that count.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: Student and teacher differ in tokens or vocabulary.
    """
    if len(teacher.hidden) != len(hidden) or teacher.weight.shape[0] != weight.shape[0]:
        raise ValueError("student and teacher must have the same tokens and the same vocabulary")
    return linear_loss_sum(hidden, weight, _KLDivergence(teacher, counted), chunk_size=chunk_size)


class _KLDivergence:
    """Objective of ``linear_loss_sum``: divergence from a teacher's distribution."""

    def __init__(self, teacher: TeacherHead, counted: Tensor) -> None:
        self.hidden = teacher.hidden.detach()
        self.head = teacher.weight.detach().to(matmul_dtype(teacher.hidden))
        self.counted = counted.unsqueeze(-1)
        self._wanted = self._got = torch.zeros(0)

    def loss(self, logits: Tensor, rows: slice) -> Tensor:
        teacher = at_least_float32(self.hidden[rows].to(self.head.dtype) @ self.head.T).to(logits.dtype)
        wanted, got = torch.log_softmax(teacher, -1), torch.log_softmax(logits, -1)
        self._wanted, self._got = wanted.exp(), got
        return (self._wanted * (wanted - got) * self.counted[rows]).sum()

    def gradient(self, logits: Tensor, rows: slice) -> Tensor:
        return self._got.exp().sub_(self._wanted).mul_(self.counted[rows])
