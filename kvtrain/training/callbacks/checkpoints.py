"""Checkpoints of a run: written whole or not at all, the newest and the best kept, ``last.ckpt`` always complete."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from kvtrain.run_folder import CHECKPOINTS, add_checkpoint, prune, rate_checkpoint, remove, step_path
from kvtrain.training.csv_logger import CSVMetrics

_KEPT = 2
_RATED_BY = "val_perplexity"


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-XXXXXX.ckpt`` every so many optimizer steps and at the end.

    A checkpoint is written under a temporary name and renamed when it is complete, so that killing the
    run at any moment leaves a run that can go on. ``best.ckpt`` names the one with the lowest held-out
    perplexity, among those whose step was validated: no step is saved for it alone.

    Args:
        run: Run folder.
        every: Optimizer steps between checkpoints.

    Raises:
        ValueError: ``every`` is not positive.
    """

    def __init__(self, run: Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"trainer.checkpoint_every must be at least 1, not {every}")
        self.run, self.every = run, every
        self.saved_step: int | None = None
        self._metrics_behind = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is already saved need not be saved again."""
        self.saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the metrics of the step that was saved: Lightning logs them after the checkpoint."""
        if self._metrics_behind:
            self._metrics_behind = False
            _save_metrics(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a multiple of ``every`` is reached, and at the last step."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rate the checkpoint of the step that was validated, where there is one."""
        perplexity = trainer.callback_metrics.get(_RATED_BY)
        fresh = trainer.global_step == self.saved_step
        if fresh and perplexity is not None and trainer.is_global_zero:
            rate_checkpoint(step_path(self.run, trainer.global_step), perplexity.item())
            prune(self.run, _KEPT)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a run that ends between two checkpoints (``max_time``, early stopping)."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the current step, unless it is saved already; every rank calls it."""
        step = trainer.global_step
        if step == self.saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, final = self.run / CHECKPOINTS, step_path(self.run, step)
        temporary = folder / f".{final.name}.new"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(".*.new"):
                remove(stale)
        trainer.strategy.barrier("checkpoint folder")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            add_checkpoint(temporary, final)
            prune(self.run, _KEPT)
        trainer.strategy.barrier("checkpoint")
        self.saved_step, self._metrics_behind = step, True
        _save_metrics(trainer)


def _save_metrics(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, CSVMetrics):
            logger.save()
