"""Distillation from a teacher's logits without ever holding ``[tokens, vocabulary]`` of either model."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.cross_entropy import IGNORE_INDEX, CrossEntropy
from kvtrain.kernels.head import Head, logits_by
from kvtrain.kernels.linear_loss import WeightedSum, linear_loss_sum

Direction = Literal["forward", "reverse"]


class TeacherHead(NamedTuple):
    """Where a teacher's logits come from.

    Attributes:
        hidden: ``(N, D_t)``, or ``(B, T, D_t)`` on its way there.
        head: Its matrix ``(V, D_t)``, or the module.
    """

    hidden: Tensor
    head: Head


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
    head: Head,
    teacher: TeacherHead,
    counted: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Summed divergence over the vocabulary, differentiable in the student's hidden states and head.

    Both models' logits are divided by the temperature ``T`` and the divergence is multiplied by ``T^2``, so that
    its gradient keeps its size (Hinton et al. 2015, section 2.1).

    Args:
        hidden: The student's, ``(N, D)``.
        head: The student's, a matrix ``(V, D)`` or the module.
        teacher: The teacher's, without gradient.
        counted: ``(N,)`` tokens that count.
        direction: ``"forward"`` is ``KL(teacher || student)``, ``"reverse"`` is ``KL(student || teacher)``.
        temperature: Of both softmaxes.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: Student and teacher differ in tokens or vocabulary.
    """
    divergence = _divergence(hidden, teacher, counted, direction, temperature)
    return linear_loss_sum(hidden, head, divergence, chunk_size=chunk_size)


def linear_mixed_sum(
    hidden: Tensor,
    head: Head,
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
        head: The student's, a matrix ``(V, D)`` or the module.
        teacher: The teacher's, without gradient.
        targets: ``(N,)`` token ids; ``-100`` counts nothing in either loss.
        divergence_weight: Share ``w`` of the divergence; cross-entropy, at temperature 1, has ``1 - w``.
        direction: As in ``linear_kl_sum``.
        temperature: As in ``linear_kl_sum``.
        chunk_size: Tokens whose logits exist at one time.

    Raises:
        ValueError: Student and teacher differ in tokens or vocabulary.
    """
    divergence = _divergence(hidden, teacher, targets != IGNORE_INDEX, direction, temperature)
    mixed = WeightedSum((divergence_weight, divergence), (1.0 - divergence_weight, CrossEntropy(targets)))
    total = linear_loss_sum(hidden, head, mixed, chunk_size=chunk_size)
    return MixedSum(total, *mixed.sums)


def _divergence(
    hidden: Tensor, teacher: TeacherHead, counted: Tensor, direction: Direction, temperature: float
) -> "_KLDivergence":
    if len(teacher.hidden) != len(hidden):
        raise ValueError(f"student and teacher must have the same tokens, not {len(hidden)} and {len(teacher.hidden)}")
    return _KLDivergence(teacher, counted, direction, temperature)


class _KLDivergence:
    """Objective of ``linear_loss_sum``: divergence from a teacher's distribution, in either direction."""

    def __init__(self, teacher: TeacherHead, counted: Tensor, direction: Direction, temperature: float) -> None:
        self.hidden = teacher.hidden.detach()
        self.teacher = logits_by(teacher.head, teacher.hidden)
        self.counted = counted.unsqueeze(-1)
        self.forward, self.temperature = direction == "forward", temperature

    def loss(self, logits: Tensor, rows: slice) -> Tensor:
        return self._sum(self._token_losses(self._teacher_log_softmax(logits, rows), self._log_softmax(logits)), rows)

    def loss_and_gradient(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher, student = self._teacher_log_softmax(logits, rows), self._log_softmax(logits)
        losses, gradient = self._token_losses(teacher, student), student.exp()
        if self.forward:
            gradient.sub_(teacher.exp())
        else:
            gradient.mul_((student - teacher).sub_(losses))
        return self._sum(losses, rows), gradient.mul_(self.counted[rows]).mul_(self.temperature)

    def _token_losses(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Divergence of each token ``(n, 1)``, from logarithms of probabilities ``(n, V)``."""
        true, model = (teacher, student) if self.forward else (student, teacher)
        return (true.exp() * (true - model)).sum(-1, keepdim=True)

    def _sum(self, losses: Tensor, rows: slice) -> Tensor:
        return (losses * self.counted[rows]).sum() * self.temperature**2

    @torch.no_grad()
    def _teacher_log_softmax(self, logits: Tensor, rows: slice) -> Tensor:
        teacher = self.teacher(self.hidden[rows]).to(logits.dtype)
        if teacher.shape != logits.shape:
            sizes = f"{logits.shape[-1]} and {teacher.shape[-1]} tokens"
            raise ValueError(f"student and teacher must have the same vocabulary, not {sizes}")
        return self._log_softmax(teacher)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits if self.temperature == 1.0 else logits / self.temperature, -1)
