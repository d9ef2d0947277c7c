"""Retrofitting Dynamic Memory Compression (Nawrot et al. 2024, section 3 and the released recipe)."""

from typing import Any

from kvtrain.data.packing import Batch
from kvtrain.models.context import LayerOutputs
from kvtrain.models.dmc import DMC
from kvtrain.models.dmc.attention import DMCAttention, DMCStep
from kvtrain.training.compression import CompressionModule
from kvtrain.training.parameters import zero_rows
from kvtrain.training.schedules import Phase, PhaseStep

ZERO_OUT, RETROFIT, FINETUNE = "zero_out", "retrofit", "finetune"
_ORDER = (ZERO_OUT, RETROFIT, FINETUNE)
# The borrowed channel is gone after this share of the zero-out phase; the rest lets the model settle.
_ZERO_OUT_SHARE = 0.8


class DMCModule(CompressionModule):
    """Three phases: ``zero_out`` frees a channel, ``retrofit`` ramps the target, ``finetune`` holds it.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: DMC's settings.
        compression_weight: See ``CompressionModule`` (released code: 1).
        noisy_finetune: Whether decisions keep their noise in the last phase (released code: yes). Without it the model
            ends on the decisions that it is served with.
        **training: See ``CompressionModule`` and what it derives from; phases carry the three names, in that order,
            each at most once.

    Raises:
        ValueError: Phases of other names or in another order, or a weight that pulls nowhere.
    """

    method: DMC

    def __init__(
        self,
        base: str,
        method: DMC | None = None,
        compression_weight: float = 1.0,
        noisy_finetune: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(base, method or DMC(), compression_weight, **training)
        self.noisy_finetune = noisy_finetune
        names = [phase.name for phase in self.schedule.phases]
        if names != [name for name in _ORDER if name in names]:
            raise ValueError(f"DMC's phases are {', '.join(_ORDER)}, in that order; the recipe has {', '.join(names)}")

    def channel_scale(self, phase_step: PhaseStep) -> float | None:
        """Factor on the borrowed channel: from 1 to 0 in the zero-out phase, None afterwards."""
        if phase_step.phase.name != ZERO_OUT:
            return None
        return max(0.0, 1.0 - phase_step.step / (_ZERO_OUT_SHARE * phase_step.phase.steps))

    def target(self, phase_step: PhaseStep) -> float:
        """Compression aimed at: 1 before the retrofit, linear in it, the method's own after it."""
        if phase_step.phase.name == ZERO_OUT:
            return 1.0
        if phase_step.phase.name == FINETUNE:
            return self.method.compression
        return 1.0 + (self.method.compression - 1.0) * (phase_step.step + 1) / phase_step.phase.steps

    def model_arguments(self, batch: Batch) -> dict[str, Any]:
        """Phase, noise key and a place for the decisions."""
        phase_step = self.phase_step()
        noisy = self.noisy_finetune or phase_step.phase.name != FINETUNE
        rows = batch["row_ids"] if noisy or self.method.decisions == "random" else None
        step = DMCStep(
            seed=self.seed,
            step=self.global_step,
            row_ids=rows,
            compression=self.target(phase_step),
            channel_scale=self.channel_scale(phase_step),
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
        return "the run is in its zero_out phase, whose channel decides nothing yet; train on into the next phase"

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
        for module in self.model.modules():
            if isinstance(module, DMCAttention):
                for parameter, rows in module.borrowed_rows():
                    zero_rows(parameter, rows)
