"""Retrofitting Dynamic Memory Sparsification (Łańcucki et al. 2025; the recipe released in NVIDIA Model Optimizer)."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvtrain.data.packing import Batch
from kvtrain.losses.distillation import Distillation
from kvtrain.models.context import LayerOutputs
from kvtrain.models.dms import DMS
from kvtrain.models.dms.attention import DMSAttention, DMSStep
from kvtrain.models.dms.convert import PROJECTION
from kvtrain.training.compression import CompressionModule
from kvtrain.training.parameters import zero_rows
from kvtrain.training.schedules import Phase, PhaseStep
from kvtrain.training.teachers import teach

ZERO_OUT, RETROFIT, FINETUNE = "zero_out", "retrofit", "finetune"
_ORDER = (ZERO_OUT, RETROFIT, FINETUNE)


class DMSModule(CompressionModule):
    """Raises the target from 1 to the method's ``compression`` in ``retrofit``, and holds it in ``finetune``.

    With ``trainable: adapter`` the decisions' own parameters alone train. The teacher is the model itself with nothing
    marked, so there is no second copy of it; checkpoints hold those parameters alone, and exporting puts them into the
    base again. With ``trainable: all`` weights move, and the untouched base teaches: a second copy in memory.

    A borrowed channel (``decide_by: query_channel``) is freed first: in ``zero_out`` a factor on it falls to 0.
    Without that phase its rows are cleared at the start.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: DMS's settings.
        compression_weight: See ``CompressionModule`` (released code: 1).
        distill: As in ``RetrofitModule``; ``true`` is ``KL(student || teacher)``, which the released code minimises.
        weight_decay: On matrices (released recipe: 0).
        **training: See ``CompressionModule`` and what it derives from; phases are called ``zero_out``, ``retrofit`` and
            ``finetune``, in that order, each at most once.

    Raises:
        ValueError: Phases of other names or in another order, one that frees a channel where none is borrowed, or
            nothing to train.
    """

    method: DMS

    def __init__(
        self,
        base: str,
        method: DMS | None = None,
        compression_weight: float = 1.0,
        distill: Distillation | bool | None = True,
        weight_decay: float = 0.0,
        **training: Any,
    ) -> None:
        distill = Distillation(direction="reverse") if distill is True else distill
        super().__init__(
            base, method or DMS(), compression_weight, distill=distill, weight_decay=weight_decay, **training
        )
        borrows, names = self.method.decide_by == "query_channel", [phase.name for phase in self.schedule.phases]
        if borrows and self._trains_adapter:
            raise ValueError("a query channel has no parameters of its own; set the method's trainable to all")
        if names != [name for name in _ORDER if name in names]:
            raise ValueError(f"DMS's phases are {', '.join(_ORDER)}, in that order; the recipe has {', '.join(names)}")
        if ZERO_OUT in names and not borrows:
            raise ValueError(f"adapters borrow no channel; leave the phase {ZERO_OUT} out")

    @property
    def _trains_adapter(self) -> bool:
        return self.method.trainable == "adapter"

    def build_model(self) -> PreTrainedModel:
        """See ``RetrofitModule``; what does not train is frozen."""
        model = super().build_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.is_trainable(name))
        return model

    def is_trainable(self, name: str) -> bool:
        """See ``TrainingModule``."""
        return not self._trains_adapter or f".{PROJECTION}" in name  # with which the name of the norm begins, too

    def frozen_base(self) -> dict[str, Any] | None:
        """See ``TrainingModule``."""
        if not self._trains_adapter:
            return None
        return {"base": self.base, "num_key_value_heads": self.num_key_value_heads}

    def _load_teacher(self) -> None:
        """Where adapters alone train, nothing: the model is its own teacher."""
        if not self._trains_adapter:
            super()._load_teacher()

    def teacher_model(self) -> nn.Module | None:
        """See ``TrainingModule``; the model itself, or the untouched base."""
        if self.distillation is None or not self._trains_adapter:
            return super().teacher_model()
        return self.model

    def teacher_inputs(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """What the teacher makes of the batch, and how to learn from it."""
        if self.distillation is None or not self._trains_adapter:
            return super().teacher_inputs(batch)
        teacher = teach(self.model, batch, step=DMSStep(full_attention=True))
        return batch, {"teacher": teacher, "distillation": self.distillation}

    def channel_scale(self, phase_step: PhaseStep) -> float | None:
        """Factor on the borrowed channel: from 1 to 0 while it is freed, None afterwards."""
        if phase_step.phase.name != ZERO_OUT:
            return None
        return 1.0 - phase_step.step / phase_step.phase.steps

    def target(self, phase_step: PhaseStep) -> float:
        """Compression aimed at: ``1 + (compression - 1) * step / steps`` in the retrofit, the method's own after it."""
        if phase_step.phase.name == ZERO_OUT:
            return 1.0
        if phase_step.phase.name == FINETUNE:
            return self.method.compression
        return 1.0 + (self.method.compression - 1.0) * phase_step.step / phase_step.phase.steps

    def model_arguments(self, batch: Batch) -> dict[str, Any]:
        """Noise key and a place for the decisions."""
        phase_step = self.phase_step()
        step = DMSStep(
            seed=self.seed,
            step=self.global_step,
            row_ids=batch["row_ids"],
            compression=self.target(phase_step),
            channel_scale=self.channel_scale(phase_step),
        )
        return {**super().model_arguments(batch), "step": step, "outputs": LayerOutputs()}

    def unlike_phases(self) -> list[int]:
        """See ``TrainingModule``; no phase holds more than those that decide."""
        names = [phase.name for phase in self.schedule.phases]
        return [next(names.index(name) for name in (RETROFIT, FINETUNE, ZERO_OUT) if name in names)]

    def export_warning(self) -> str | None:
        """A borrowed channel decides nothing until it is free."""
        if self.schedule.phase_step(self._seen_step()).phase.name != ZERO_OUT:
            return None
        return f"the run is in its {ZERO_OUT} phase, whose channel decides nothing yet; train on into the next"

    def on_train_start(self) -> None:
        """A recipe that does not free its channel starts with the borrowed rows cleared."""
        if self.global_step == 0 and self.schedule.phases[0].name != ZERO_OUT:
            self._zero_borrowed_rows()

    def begin_phase(self, phase: Phase) -> None:
        """Clear the optimizer; of a channel that has been freed, clear the rows that made it."""
        super().begin_phase(phase)
        if self.schedule.phases[self.phase_step().index - 1].name == ZERO_OUT:
            self._zero_borrowed_rows()

    def _zero_borrowed_rows(self) -> None:
        if self.method.decide_by != "query_channel":
            return
        for module in self.model.modules():
            if isinstance(module, DMSAttention):
                for parameter, rows in module.borrowed_rows():
                    zero_rows(parameter, rows)
