"""Retrofitting Dynamic Memory Compression (Nawrot et al. 2024, section 3 and the released recipe)."""

from typing import Any

from kvtrain.data.packing import Batch
from kvtrain.models.dmc import DMC
from kvtrain.models.dmc.attention import DMCStep
from kvtrain.training.borrowed_channel import FINETUNE, BorrowedChannelModule
from kvtrain.training.schedules import PhaseStep


class DMCModule(BorrowedChannelModule):
    """Frees a channel, raises the target from 1 to the method's ``compression``, and holds it.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: DMC's settings.
        compression_weight: See ``CompressionModule`` (released code: 1).
        noisy_finetune: Whether decisions keep their noise in the last phase (released code: yes). Without it the model
            ends on the decisions that it is served with.
        **training: See ``BorrowedChannelModule`` and what it derives from.

    Raises:
        ValueError: Phases of other names or in another order, or a weight that pulls nowhere.
    """

    method: DMC
    ramp_lead = 1
    zero_out_share = 0.8

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

    def decision_step(self, **settings: Any) -> DMCStep:
        """See ``BorrowedChannelModule``."""
        return DMCStep(**settings)

    def noise_rows(self, batch: Batch, phase_step: PhaseStep) -> Any:
        """See ``BorrowedChannelModule``; decisions at random are noise in every phase."""
        noisy = self.noisy_finetune or phase_step.phase.name != FINETUNE
        return batch["row_ids"] if noisy or self.method.decisions == "random" else None
