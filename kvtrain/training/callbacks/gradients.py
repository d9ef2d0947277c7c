"""How large the gradient is before it is clipped."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor


class GradientNorm(pl.Callback):
    """Logs ``gradient_norm``, over all trained parameters, before clipping.

    Attributes:
        norm: Of the optimizer step that is being taken, on the device. DeepSpeed keeps gradients to itself and
            tells after the step; None until then.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure and log."""
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            self.norm = global_norm(optimizer)
            pl_module.log("gradient_norm", self.norm)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask DeepSpeed at the end of an optimizer step, and log."""
        if isinstance(trainer.strategy, DeepSpeedStrategy) and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            engine: Any = trainer.model
            norm = engine.get_global_grad_norm()
            if norm is not None:
                self.norm = torch.as_tensor(norm)
                pl_module.log("gradient_norm", self.norm)


def global_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """2-norm of all gradients of an optimizer, sharded ones included; every rank calls it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
