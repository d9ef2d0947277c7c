"""Learning from a frozen teacher's distribution, beside or instead of the next token."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.distillation import Direction, TeacherHead, linear_kl_sum, linear_mixed_sum
from kvtrain.kernels.head import Head

Target = Literal["logits", "hidden"]


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher (Hinton et al. 2015, section 2).

    The defaults are pure ``KL(teacher || student)``.

    Attributes:
        weight: Share of the divergence in the loss, above 0 and up to 1; cross-entropy has the rest.
        direction: ``forward`` is ``KL(teacher || student)``: the student covers all that the teacher says.
            ``reverse`` is ``KL(student || teacher)``: it says nothing that the teacher would not.
        temperature: Divides both models' logits in the divergence, which is multiplied by its square.
        of: What is compared: ``logits``, by the divergence of distributions, or ``hidden``, the last hidden states
            after the final norm, by the mean square of their difference (DuoAttention, section 2.2).

    Raises:
        ValueError: A setting is out of range.
    """

    weight: float = 1.0
    direction: Direction = "forward"
    temperature: float = 1.0
    of: Target = "logits"

    def __post_init__(self) -> None:
        if self.of not in get_args(Target):
            raise ValueError(f"distill.of is {self.of!r}; use {' or '.join(get_args(Target))}")
        if not 0.0 < self.weight <= 1.0:
            raise ValueError(f"distill.weight is {self.weight}; it is a share, above 0 and up to 1")
        if self.direction not in get_args(Direction):
            raise ValueError(f"distill.direction is {self.direction!r}; use {' or '.join(get_args(Direction))}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"distill.temperature is {self.temperature}; it must be above 0")


def distillation_sum(
    hidden: Tensor, head: Head, teacher: TeacherHead, targets: Tensor, settings: Distillation
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of a student that learns from a teacher.

    Args:
        hidden: The student's, ``(N, D)``.
        head: The student's, a matrix ``(V, D)`` or the module.
        teacher: The teacher's ``(N, D_t)`` and head.
        targets: ``(N,)`` token ids; ``-100`` counts nothing.
        settings: What is minimised.

    Returns:
        The loss, and its parts ``divergence`` and ``cross_entropy`` without gradient; no parts where it has one alone.

    Raises:
        ValueError: Student and teacher differ in tokens or vocabulary.
    """
    if settings.of == "hidden":
        return _hidden_sum(hidden, head, teacher.hidden, targets, settings.weight)
    direction, temperature = settings.direction, settings.temperature
    if settings.weight == 1.0:
        counted = targets != IGNORE_INDEX
        return linear_kl_sum(hidden, head, teacher, counted, direction=direction, temperature=temperature), {}
    mixed = linear_mixed_sum(
        hidden,
        head,
        teacher,
        targets,
        divergence_weight=settings.weight,
        direction=direction,
        temperature=temperature,
    )
    return mixed.total, {"divergence": mixed.divergence, "cross_entropy": mixed.cross_entropy}


def _hidden_sum(
    hidden: Tensor, head: Head, teacher: Tensor, targets: Tensor, share: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``distillation_sum``, of hidden states."""
    if hidden.shape != teacher.shape:
        raise ValueError(
            f"the student's hidden states are {tuple(hidden.shape)} and the teacher's {tuple(teacher.shape)}; "
            "learn from logits instead (distill.of: logits)"
        )
    difference = at_least_float32(hidden) - at_least_float32(teacher)
    distance = (difference.square().mean(-1) * (targets != IGNORE_INDEX)).sum()
    if share == 1.0:
        return distance, {}
    cross_entropy = linear_cross_entropy_sum(hidden, head, targets)
    total = share * distance + (1.0 - share) * cross_entropy
    return total, {"divergence": distance.detach(), "cross_entropy": cross_entropy.detach()}
