"""Training whose heads decide which tokens share or lose their slots: target, hinge, and what was decided."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.data.packing import Batch
from kvtrain.losses.compression import compressed_fraction, compression_hinge, tokens_per_slot
from kvtrain.models.context import LayerOutputs
from kvtrain.models.gating import has_choice
from kvtrain.models.method import Method
from kvtrain.training.callbacks.head_compression import HeadCompression
from kvtrain.training.retrofit import RetrofitModule
from kvtrain.training.schedules import PhaseStep


class CompressionModule(RetrofitModule):
    """Pulls decisions towards a number of tokens a slot, beside the loss of the model.

    Its method's attention leaves decisions ``(B, H_kv, T)``, straight-through, in the pass' ``outputs``.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: The method.
        compression_weight: Of the compression hinge beside the mean loss of a token. The target is reached where
            compressing one more token in a hundred costs less than a hundredth of this.
        **training: See ``RetrofitModule`` and ``TrainingModule``.

    Raises:
        ValueError: A weight that pulls nowhere.
    """

    def __init__(self, base: str, method: Method, compression_weight: float = 1.0, **training: Any) -> None:
        super().__init__(base, method, **training)
        if compression_weight <= 0:
            raise ValueError(f"compression_weight must be above 0, not {compression_weight}; 1 is the released code's")
        self.compression_weight = compression_weight

    @abstractmethod
    def target(self, phase_step: PhaseStep) -> float:
        """Tokens a slot aimed at in a step."""

    def configure_callbacks(self) -> list[pl.Callback]:
        """What each head decides is written down at every validation."""
        self._heads = HeadCompression(Path(self.trainer.default_root_dir))
        return [self._heads]

    def extra_loss(self, batch: Batch, arguments: dict[str, Any]) -> Tensor | None:
        """The compression hinge."""
        decisions: LayerOutputs = arguments["outputs"]
        if not decisions:
            return None
        fractions = compressed_fraction(decisions.values(), has_choice(batch["document_ids"]))
        target = self.target(self.phase_step())
        self.log_mean("compression", fractions.mean(), transform=tokens_per_slot, prog_bar=True)
        self.log("compression_target", target, prog_bar=True)
        return self.compression_weight * compression_hinge(fractions, target)

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        super().on_validation_epoch_start()
        self._validation_compressed = torch.zeros(2, device=self.device)  # sum of fractions, rows

    def observe_validation(self, batch: Batch, arguments: dict[str, Any], output: Any) -> None:
        """Collect what hard decisions compress of the held-out rows."""
        super().observe_validation(batch, arguments, output)
        decisions: LayerOutputs = arguments["outputs"]
        if decisions:
            free = has_choice(batch["document_ids"])
            self._heads.count(decisions, free)
            fractions = compressed_fraction(decisions.values(), free)
            real = (batch["document_ids"] > 0).any(1)
            self._validation_compressed += torch.stack([fractions[real].sum(), real.sum()])

    def on_validation_epoch_end(self) -> None:
        """Log the held-out compression with the perplexity."""
        super().on_validation_epoch_end()
        compressed, rows = self.trainer.strategy.reduce(self._validation_compressed, reduce_op="sum")
        if rows > 0:
            self.log("val_compression", tokens_per_slot(compressed / rows), prog_bar=True)
