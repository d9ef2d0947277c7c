"""Retrofitting Dynamic Memory Compression (Nawrot et al. 2024, section 3 and the released recipe)."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.data.packing import Batch
from kvtrain.losses.compression import compression_hinge, free_to_merge, merged_fraction
from kvtrain.models.context import LayerOutputs
from kvtrain.models.dmc import DMC
from kvtrain.models.dmc.attention import DMCAttention, DMCStep
from kvtrain.training.callbacks.head_compression import HeadCompression
from kvtrain.training.parameters import zero_rows
from kvtrain.training.retrofit import RetrofitModule
from kvtrain.training.schedules import Phase, PhaseStep

ZERO_OUT, RETROFIT, FINETUNE = "zero_out", "retrofit", "finetune"
_ORDER = (ZERO_OUT, RETROFIT, FINETUNE)
# The borrowed channel is gone after this share of the zero-out phase; the rest lets the model settle.
_ZERO_OUT_SHARE = 0.8


class DMCModule(RetrofitModule):
    """Three phases: ``zero_out`` frees a channel, ``retrofit`` ramps the target, ``finetune`` holds it.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: DMC's settings.
        compression_weight: Of the compression hinge beside the mean loss of a token (released code: 1). The target is
            reached where merging one more token in a hundred costs less than a hundredth of this.
        noisy_finetune: Whether decisions keep their noise in the last phase (released code: yes). Without it the model
            ends on the decisions that it is served with.
        **training: See ``RetrofitModule`` and ``TrainingModule``; phases carry the three names, in that order, each
            at most once.

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
        super().__init__(base, method or DMC(), **training)
        if compression_weight <= 0:
            raise ValueError(f"compression_weight must be above 0, not {compression_weight}; 1 is the released code's")
        self.compression_weight, self.noisy_finetune = compression_weight, noisy_finetune
        names = [phase.name for phase in self.schedule.phases]
        if names != [name for name in _ORDER if name in names]:
            raise ValueError(f"DMC's phases are {', '.join(_ORDER)}, in that order; the recipe has {', '.join(names)}")

    def configure_callbacks(self) -> list[pl.Callback]:
        """What each head decides is written down at every validation."""
        self._heads = HeadCompression(Path(self.trainer.default_root_dir))
        return [self._heads]

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
            self.channel_scale(phase_step), self.seed, self.global_step, rows, compression=self.target(phase_step)
        )
        return {**super().model_arguments(batch), "step": step, "outputs": LayerOutputs()}

    def extra_loss(self, batch: Batch, arguments: dict[str, Any]) -> Tensor | None:
        """The compression hinge."""
        phase_step = self.phase_step()
        fractions = self._fractions(batch, arguments)
        if fractions is None:
            return None
        self.log("compression", 1 / (1 - fractions.detach().mean()), prog_bar=True)
        self.log("compression_target", self.target(phase_step), prog_bar=True)
        return self.compression_weight * compression_hinge(fractions, self.target(phase_step))

    def _fractions(self, batch: Batch, arguments: dict[str, Any]) -> Tensor | None:
        decisions: LayerOutputs = arguments["outputs"]
        if not decisions:
            return None
        return merged_fraction(decisions.values(), free_to_merge(batch["document_ids"]))

    def unlike_phases(self) -> list[int]:
        """See ``TrainingModule``; no phase holds more than ``retrofit``, and ``finetune`` as much, if it has noise."""
        names = [phase.name for phase in self.schedule.phases]
        return [next(names.index(name) for name in (RETROFIT, FINETUNE, ZERO_OUT) if name in names)]

    def export_warning(self) -> str | None:
        """The borrowed channel decides nothing until zero-out has ended."""
        if self.schedule.phase_step(self._seen_step()).phase.name != ZERO_OUT:
            return None
        return "the run is in its zero_out phase, whose channel decides nothing yet; train on into the next phase"

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        super().on_validation_epoch_start()
        self._validation_merged = torch.zeros(2, device=self.device)  # sum of fractions, rows

    def observe_validation(self, batch: Batch, arguments: dict[str, Any], output: Any) -> None:
        """Collect what hard decisions merge in the held-out rows."""
        fractions = self._fractions(batch, arguments)
        if fractions is not None:
            self._heads.count(arguments["outputs"], free_to_merge(batch["document_ids"]))
            real = (batch["document_ids"] > 0).any(1)
            self._validation_merged += torch.stack([fractions[real].sum(), real.sum()])

    def on_validation_epoch_end(self) -> None:
        """Log the held-out compression with the perplexity."""
        super().on_validation_epoch_end()
        merged, rows = self.trainer.strategy.reduce(self._validation_merged, reduce_op="sum")
        if rows > 0:
            self.log("val_compression", 1 / (1 - merged / rows), prog_bar=True)

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
