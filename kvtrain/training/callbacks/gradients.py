"""How large the gradient is before it is clipped."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.training.strategies.base import traits


class GradientNorm(pl.Callback):
    """Logs ``gradient_norm``, over all trained parameters, before clipping.

    Attributes:
        norm: Of the optimizer step that is being taken, on the device. Some strategies keep gradients to themselves and
            tell after the step; None until then.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure and log."""
        self._note(pl_module, traits(trainer).gradient_norm(optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask at the end of an optimizer step, where it could not be measured, and log."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._note(pl_module, traits(trainer).last_gradient_norm())

    def _note(self, module: pl.LightningModule, norm: Tensor | None) -> None:
        if norm is not None:
            self.norm = norm
            module.log("gradient_norm", norm)
