"""Retrofitting Dynamic Memory Sparsification (Łańcucki et al. 2025; the recipe released in NVIDIA Model Optimizer)."""

from typing import Any

from kvtrain.data.packing import Batch
from kvtrain.losses.distillation import Distillation
from kvtrain.models.dms import DMS
from kvtrain.models.dms.attention import DMSStep
from kvtrain.models.dms.convert import PROJECTION
from kvtrain.training.borrowed_channel import ZERO_OUT, BorrowedChannelModule
from kvtrain.training.teachers import teach


class DMSModule(BorrowedChannelModule):
    """Raises the target from 1 to the method's ``compression`` in ``retrofit``, and holds it in ``finetune``.

    With ``trainable: adapter`` the decisions' own parameters train, beside those of ``lora``. The teacher is the model
    itself with nothing marked, so there is no second copy of it; checkpoints hold what is learnt alone, and exporting
    puts it into the base again. With ``trainable: all`` weights move, and the untouched base teaches: a second copy in
    memory.

    A borrowed channel (``decide_by: query_channel``) is freed first: in ``zero_out`` a factor on it falls to 0.
    Without that phase its rows are cleared at the start.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: DMS's settings.
        compression_weight: See ``CompressionModule`` (released code: 1).
        distill: As in ``RetrofitModule``; ``true`` is ``KL(student || teacher)``, which the released code minimises.
        weight_decay: On matrices (released recipe: 0).
        **training: See ``BorrowedChannelModule`` and what it derives from.

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
        if ZERO_OUT in names and not borrows:
            raise ValueError(f"adapters borrow no channel; leave the phase {ZERO_OUT} out")

    @property
    def _trains_adapter(self) -> bool:
        return self.method.trainable == "adapter"

    @property
    def trains_base(self) -> bool:
        """See ``RetrofitModule``."""
        return super().trains_base and not self._trains_adapter

    def learns(self, name: str) -> bool:
        """See ``RetrofitModule``."""
        return not self._trains_adapter or f".{PROJECTION}" in name  # with which the name of the norm begins, too

    @property
    def teaches_itself(self) -> bool:
        """See ``RetrofitModule``; where all of the base is there, and stays."""
        changes = self.num_key_value_heads or (self.lora is not None and self.lora.train_also)
        return self._trains_adapter and not changes

    def teacher_inputs(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """What the teacher makes of the batch, and how to learn from it."""
        if self.distillation is None or not self.teaches_itself:
            return super().teacher_inputs(batch)
        with self.as_base():
            teacher = teach(self.model, batch, step=DMSStep(full_attention=True))
        return batch, {"teacher": teacher, "distillation": self.distillation}

    def decision_step(self, **settings: Any) -> DMSStep:
        """See ``BorrowedChannelModule``."""
        return DMSStep(**settings)
