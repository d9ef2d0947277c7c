"""Phases of a run and what the step number means in them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own learning-rate curve; the optimizer starts anew at each.

    Args:
        name: What happens in it; architectures give names a meaning.
        steps: Optimizer steps.
        learning_rate: At its start, after warm-up.
        final_learning_rate: At its end; None keeps it constant.
        warmup_steps: Steps over which the learning rate rises linearly.
        decay_steps: Last steps, over which it falls linearly towards 0, no lower than ``final_learning_rate``; None:
            along a cosine from the warm-up on.
        initial_learning_rate: What the warm-up does not go below.
        inverse_root: After the warm-up the learning rate falls with the root of the step instead, to no end.

    Raises:
        ValueError: A number is out of range.
    """

    name: str
    steps: int
    learning_rate: float
    final_learning_rate: float | None = None
    warmup_steps: int = 0
    decay_steps: int | None = None
    initial_learning_rate: float = 0.0
    inverse_root: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phase {self.name!r}: steps must be at least 1, not {self.steps}; leave the phase out")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"phase {self.name!r}: warmup_steps must be from 0 to below its {self.steps} steps")
        if not (0 < self.learning_rate < math.inf and 0 <= (self.final_learning_rate or 0) < math.inf):
            raise ValueError(f"phase {self.name!r}: learning rates must be positive and finite")
        if not 0 <= self.initial_learning_rate <= self.learning_rate:
            raise ValueError(f"phase {self.name!r}: initial_learning_rate must be from 0 to learning_rate")
        if self.decay_steps is not None and not 1 <= self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(f"phase {self.name!r}: decay_steps must be from 1 to its steps without the warm-up")
        if self.decay_steps is not None and self.final_learning_rate is None:
            raise ValueError(f"phase {self.name!r}: decay_steps needs final_learning_rate, at which it stops")
        if self.inverse_root and (self.final_learning_rate is not None or not self.warmup_steps):
            raise ValueError(
                f"phase {self.name!r}: inverse_root falls from the end of a warm-up and has no end of its own; "
                "give warmup_steps, and leave final_learning_rate out"
            )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the phase's own step, counted from 0."""
        if step < self.warmup_steps:
            return max(self.initial_learning_rate, self.learning_rate * (step + 1) / self.warmup_steps)
        if self.inverse_root:
            return self.learning_rate * math.sqrt(self.warmup_steps / (step + 1))
        if self.final_learning_rate is None:
            return self.learning_rate
        if self.decay_steps is not None:
            left = min(1.0, (self.steps - step) / self.decay_steps)
            return max(self.final_learning_rate, self.learning_rate * left)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps - 1)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class PhaseStep:
    """Where a global step lies.

    Attributes:
        phase: The phase.
        index: Its number.
        step: Steps done within it.
    """

    phase: Phase
    index: int
    step: int


class Schedule:
    """The phases of a run, one after the other.

    Raises:
        ValueError: There is no phase.
    """

    def __init__(self, phases: list[Phase]) -> None:
        if not phases:
            raise ValueError("a run needs at least one phase")
        self.phases = phases

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def phase_step(self, step: int) -> PhaseStep:
        """Where a global step lies; steps past the end belong to the last phase's last step."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return PhaseStep(phase, index, step)
            step -= phase.steps
        return PhaseStep(self.phases[-1], len(self.phases) - 1, self.phases[-1].steps - 1)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a global step."""
        phase_step = self.phase_step(step)
        return phase_step.phase.learning_rate_at(phase_step.step)

    def is_boundary(self, step: int) -> bool:
        """Whether a phase other than the first begins with this global step."""
        phase_step = self.phase_step(step)
        return step < self.total_steps and phase_step.index > 0 and phase_step.step == 0
