"""Training of decisions that are read from a channel of attention, which must first be freed of what it did there."""

from abc import abstractmethod
from typing import Any, ClassVar

from kvtrain.data.packing import Batch
from kvtrain.models.adapters import own_rows
from kvtrain.models.context import LayerOutputs
from kvtrain.models.gating import DecisionStep, borrowed_parameters
from kvtrain.models.method import Method
from kvtrain.training.compression import CompressionModule
from kvtrain.training.parameters import zero_rows
from kvtrain.training.schedules import Phase, PhaseStep

ZERO_OUT, RETROFIT, FINETUNE = "zero_out", "retrofit", "finetune"
_ORDER = (ZERO_OUT, RETROFIT, FINETUNE)


class BorrowedChannelModule(CompressionModule):
    """Three phases: ``zero_out`` frees a channel, ``retrofit`` ramps the target, ``finetune`` holds it.

    Subclasses say what attention is told in a step, and how their papers count.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: The method, whose ``compression`` is aimed at in the end.
        compression_weight: See ``CompressionModule``.
        **training: See ``CompressionModule``; phases carry the three names, in that order, each at most once.

    Attributes:
        ramp_lead: Steps by which the rise of the target is ahead of the steps of the retrofit.
        zero_out_share: Of the zero-out phase, after which the channel is gone; the rest lets the model settle.

    Raises:
        ValueError: Phases of other names or in another order, or a weight that pulls nowhere.
    """

    method: Any  # with ``compression``
    ramp_lead: ClassVar[int] = 0
    zero_out_share: ClassVar[float] = 1.0

    def __init__(self, base: str, method: Method, compression_weight: float = 1.0, **training: Any) -> None:
        super().__init__(base, method, compression_weight, **training)
        names = [phase.name for phase in self.schedule.phases]
        if names != [name for name in _ORDER if name in names]:
            own = f"{type(self.method).__name__}'s phases are {', '.join(_ORDER)}"
            raise ValueError(f"{own}, in that order; the recipe has {', '.join(names)}")

    def channel_scale(self, phase_step: PhaseStep) -> float | None:
        """Factor on the borrowed channel: from 1 to 0 in the zero-out phase, None afterwards."""
        if phase_step.phase.name != ZERO_OUT:
            return None
        return max(0.0, 1.0 - phase_step.step / (self.zero_out_share * phase_step.phase.steps))

    def target(self, phase_step: PhaseStep) -> float:
        """Compression aimed at: 1 before the retrofit, linear in it, the method's own after it."""
        if phase_step.phase.name == ZERO_OUT:
            return 1.0
        if phase_step.phase.name == FINETUNE:
            return float(self.method.compression)
        done, of = phase_step.step + self.ramp_lead, phase_step.phase.steps
        return 1.0 + float(self.method.compression - 1.0) * done / of

    @abstractmethod
    def decision_step(self, **settings: Any) -> DecisionStep:
        """What attention is told in a step: the settings of a ``DecisionStep``, and ``channel_scale``."""

    def noise_rows(self, batch: Batch, phase_step: PhaseStep) -> Any:
        """Rows ``(B,)`` that noise is keyed by; None trains without noise."""
        return batch["row_ids"]

    def model_arguments(self, batch: Batch) -> dict[str, Any]:
        """Phase, noise key and a place for the decisions."""
        phase_step = self.phase_step()
        scale = self.channel_scale(phase_step)
        if self.lora is not None:
            for module in own_rows(self.model):
                module.active = scale is None
        step = self.decision_step(
            seed=self.seed,
            step=self.global_step,
            row_ids=self.noise_rows(batch, phase_step),
            compression=self.target(phase_step),
            channel_scale=scale,
        )
        return {**super().model_arguments(batch), "step": step, "outputs": LayerOutputs()}

    def unlike_phases(self) -> list[int]:
        """See ``TrainingModule``; no phase holds more than ``retrofit``, and ``finetune`` as much, if it has noise."""
        names = [phase.name for phase in self.schedule.phases]
        return [next(names.index(name) for name in (RETROFIT, FINETUNE, ZERO_OUT) if name in names)]

    def export_warning(self) -> str | None:
        """The borrowed channel decides nothing until zero-out has ended."""
        if self.schedule.phase_step(self._seen_step()).phase.name != ZERO_OUT:
            return None
        return f"the run is in its {ZERO_OUT} phase, whose channel decides nothing yet; train on into the next phase"

    def on_train_start(self) -> None:
        """A recipe without zero-out starts with the borrowed rows cleared."""
        if self.global_step == 0 and self.schedule.phases[0].name != ZERO_OUT:
            self._zero_borrowed_rows()

    def begin_phase(self, phase: Phase) -> None:
        """Clear the optimizer; after zero-out, clear the rows that the channel no longer needs."""
        super().begin_phase(phase)
        if self.schedule.phases[self.phase_step().index - 1].name == ZERO_OUT:
            self._zero_borrowed_rows()

    def _zero_borrowed_rows(self) -> None:
        if self.lora is not None:  # rows of their own begin at zero, and the base's stay
            return
        for parameter, rows in borrowed_parameters(self.model):
            zero_rows(parameter, rows)
