"""What a training holds at each of its moments, and what of that a rank holds."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self


class Held(NamedTuple):
    """Bytes at one moment, by kind.

    Attributes:
        parameters: Weights of the model, shared ones once.
        gradients: Gradients that lie at their parameters.
        optimizer: The optimizer's state.
        others: Activations, temporary tensors, batches and a teacher.
    """

    parameters: int
    gradients: int
    optimizer: int
    others: int


class Sharding(NamedTuple):
    """Between how many ranks each kind is divided; 1: every rank holds all of it.

    Attributes:
        parameters: Weights (ZeRO-3, FSDP2). The layer at work, which is gathered for the time, comes on top.
        gradients: Gradients (ZeRO-2, ZeRO-3, FSDP2).
        optimizer: The optimizer's state (any of them).
    """

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1

    def share(self, held: Held) -> Held:
        """What a rank holds, the last one perhaps less."""
        return Held(
            parameters=-(-held.parameters // self.parameters),
            gradients=-(-held.gradients // self.gradients),
            optimizer=-(-held.optimizer // self.optimizer),
            others=held.others,
        )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one device.

    Attributes:
        parameters: Weights of the model, shared ones once.
        gradients: Of the trained ones.
        optimizer: Its state.
        teacher: A second model that does not train; 0 without one.
        kept: What the forward pass of a phase's first step leaves for the backward pass, weights cast to half
            precision among it, by phase.
        moments: Most that is held in each part of a step.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    kept: tuple[int, ...]
    moments: Mapping[Hashable, Held]

    @property
    def activations(self) -> int:
        """What a forward pass leaves for its backward pass, in the phase where that is most."""
        return max(self.kept)

    @property
    def temporary(self) -> int:
        """What the peak holds besides all that lasts."""
        return self.peak - self.parameters - self.gradients - self.optimizer - self.teacher - self.activations

    @property
    def peak(self) -> int:
        """All that is held at the moment at which most is."""
        return max(sum(held) for held in self.moments.values())

    def sharded(self, sharding: Sharding) -> "TrainingMemory":
        """What a rank holds where ranks divide some of it between them; its peak may lie at another moment."""
        whole = Held(self.parameters, self.gradients, self.optimizer, 0)
        parameters, gradients, optimizer, _ = sharding.share(whole)
        moments = {moment: sharding.share(held) for moment, held in self.moments.items()}
        return TrainingMemory(parameters, gradients, optimizer, self.teacher, self.kept, moments)

    @classmethod
    def blend(cls, parts: Sequence[tuple[float, Self]]) -> "TrainingMemory":
        """Weighted sum, figure by figure and moment by moment; of moments those of the first part.

        Args:
            parts: Weights, which sum to 1, and memories: along whatever grows evenly a line goes through two of them.
        """
        weights = [weight for weight, _ in parts]

        def total(figures: Iterable[int]) -> int:
            return round(sum(weight * figure for weight, figure in zip(weights, figures, strict=True)))

        def each(rows: Iterable[Sequence[int]]) -> list[int]:
            return [total(column) for column in zip(*rows, strict=True)]

        return TrainingMemory(
            parameters=total(memory.parameters for _, memory in parts),
            gradients=total(memory.gradients for _, memory in parts),
            optimizer=total(memory.optimizer for _, memory in parts),
            teacher=total(memory.teacher for _, memory in parts),
            kept=tuple(each(memory.kept for _, memory in parts)),
            moments={
                moment: Held(*each(memory.moments[moment] for _, memory in parts)) for moment in parts[0][1].moments
            },
        )
