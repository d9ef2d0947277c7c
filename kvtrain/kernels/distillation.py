"""Distillation from a teacher's logits without ever holding ``[tokens, vocabulary]`` of either model."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.cross_entropy import IGNORE_INDEX, CrossEntropy
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.linear_loss import WeightedSum, linear_loss_sum, matmul_dtype

Direction = Literal["forward", "reverse"]


class TeacherHead(NamedTuple):
    """Where a teacher's logits come from: ``hidden @ weight.T``.

    Attributes:
        hidden: ``(N, D_t)``, or ``(B, T, D_t)`` on its way there.
        weight: ``(V, D_t)``.
    """

    hidden: Tensor
    weight: Tensor


class MixedSum(NamedTuple):
    """Divergence and cross-entropy of the same logits.

    Attributes:
        total: The two, weighed and added; differentiable.
        divergence: By itself, without gradient.
        cross_entropy: By itself, without gradient.
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def linear_kl_sum(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead,
    counted: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Summed divergence over the vocabulary, differentiable in the student's two factors.

    Both models' logits are divided by the temperature ``T`` and the divergence is multiplied by ``T^2``, so that
    its gradient keeps its size (Hinton et al. 2015, section 2.1).

    Args:
        hidden: The student's, ``(N, D)``.
        weight: The student's head, ``(V, D)``.
        teacher: The teacher's, without gradient.
        counted: ``(N,)`` tokens that count.
        direction: ``"forward"`` is ``KL(teacher || student)``, ``"reverse"`` is ``KL(student || teacher)``.
        temperature: Of both softmaxes.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: Student and teacher differ in tokens or vocabulary.
    """
    divergence = _divergence(hidden, weight, teacher, counted, direction, temperature)
    return linear_loss_sum(hidden, weight, divergence, chunk_size=chunk_size)


def linear_mixed_sum(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead,
    targets: Tensor,
    *,
    divergence_weight: float,
    direction: Direction = "forward",
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> MixedSum:
    """Divergence from a teacher beside next-token loss, the student's logits built once for both.

    Args:
        hidden: The student's, ``(N, D)``.
        weight: The student's head, ``(V, D)``.
        teacher: The teacher's, without gradient.
        targets: ``(N,)`` token ids; ``-100`` counts nothing in either loss.
        divergence_weight: Share ``w`` of the divergence; cross-entropy, at temperature 1, has ``1 - w``.
        direction: As in ``linear_kl_sum``.
        temperature: As in ``linear_kl_sum``.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: Student and teacher differ in tokens or vocabulary.
    """
    divergence = _divergence(hidden, weight, teacher, targets != IGNORE_INDEX, direction, temperature)
    mixed = WeightedSum((divergence_weight, divergence), (1.0 - divergence_weight, CrossEntropy(targets)))
    total = linear_loss_sum(hidden, weight, mixed, chunk_size=chunk_size)
    return MixedSum(total, *mixed.sums)


def _divergence(
    hidden: Tensor, weight: Tensor, teacher: TeacherHead, counted: Tensor, direction: Direction, temperature: float
) -> "_KLDivergence":
    if len(teacher.hidden) != len(hidden) or teacher.weight.shape[0] != weight.shape[0]:
        raise ValueError("student and teacher must have the same tokens and the same vocabulary")
    return _KLDivergence(teacher, counted, direction, temperature)


class _KLDivergence:
    """Objective of ``linear_loss_sum``: divergence from a teacher's distribution, in either direction."""

    def __init__(self, teacher: TeacherHead, counted: Tensor, direction: Direction, temperature: float) -> None:
        self.hidden = teacher.hidden.detach()
        self.head = teacher.weight.detach().to(matmul_dtype(teacher.hidden))
        self.counted = counted.unsqueeze(-1)
        self.forward, self.temperature = direction == "forward", temperature
        self._teacher = self._student = self._token_losses = torch.zeros(0)

    def loss(self, logits: Tensor, rows: slice) -> Tensor:
        teacher = at_least_float32(self.hidden[rows].to(self.head.dtype) @ self.head.T).to(logits.dtype)
        self._teacher, self._student = self._log_softmax(teacher), self._log_softmax(logits)
        true, model = (self._teacher, self._student) if self.forward else (self._student, self._teacher)
        self._token_losses = (true.exp() * (true - model)).sum(-1, keepdim=True)
        return (self._token_losses * self.counted[rows]).sum() * self.temperature**2

    def gradient(self, logits: Tensor, rows: slice) -> Tensor:
        gradient = self._student.exp()
        if self.forward:
            gradient.sub_(self._teacher.exp())
        else:
            gradient.mul_((self._student - self._teacher).sub_(self._token_losses))
        return gradient.mul_(self.counted[rows]).mul_(self.temperature)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits if self.temperature == 1.0 else logits / self.temperature, -1)
