"""Tokens per second over all ranks, and the share of the devices' peak that this is."""

import time
from typing import Any

import lightning.pytorch as pl

from kvtrain.training.base import TrainingModule
from kvtrain.training.flops import TrainingFlops, peak_flops, training_flops

_WINDOW = 20


class Throughput(pl.Callback):
    """Logs ``tokens_per_second``, the mean over the last optimizer steps, pads excluded and validations too.

    Beside it, where a device's peak is known, its use as ``mfu`` (what training needs) and ``hfu`` (recomputed
    layers and a teacher's forward pass included); ``kvtrain.training.flops`` says what is counted.

    Args:
        peak: Dense FLOP/s of one device in the precision of the run; None looks the device up.

    Raises:
        ValueError: ``peak`` is not positive.
    """

    def __init__(self, peak: float | None = None) -> None:
        if peak is not None and peak <= 0:
            raise ValueError(f"trainer.peak_flops must be positive, not {peak}")
        self.peak = peak
        self._marks: list[tuple[float, int]] = []
        self._tokens = 0
        self._flops: TrainingFlops | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look the device up."""
        self.peak = self.peak or peak_flops(trainer.strategy.root_device, trainer.precision)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new mean: the time of a validation is no training's."""
        self._marks = [(time.monotonic(), self._tokens)] if self._marks else []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; at the end of an optimizer step, log."""
        self._tokens += int((batch["document_ids"] > 0).sum()) * trainer.world_size
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._marks = [*self._marks[-_WINDOW:], (time.monotonic(), self._tokens)]
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        if last > first:
            speed = (after - before) / (last - first)
            pl_module.log("tokens_per_second", speed, prog_bar=True)
            self._log_utilisation(pl_module, speed / trainer.world_size, batch["input_ids"].shape[1])

    def _log_utilisation(self, module: pl.LightningModule, speed: float, sequence_length: int) -> None:
        """Of one device, from its tokens per second."""
        if self.peak is None:
            return
        if self._flops is None:
            assert isinstance(module, TrainingModule)
            self._flops = training_flops(module.model, sequence_length, teacher=module.teacher_model())
        module.log("mfu", speed * self._flops.model / self.peak, prog_bar=True)
        module.log("hfu", speed * self._flops.hardware / self.peak)
