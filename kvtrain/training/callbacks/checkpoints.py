"""Checkpoints of a run: written whole or not at all, the newest and the best kept, ``last.ckpt`` always complete."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from kvtrain.durable import remove, remove_leftovers, temporary_name
from kvtrain.run_folder import (
    add_checkpoint,
    describe_checkpoint,
    prune,
    rate_checkpoint,
    refresh_best,
    step_path,
)
from kvtrain.training.callbacks.missed_validation import is_validation_due, run_validation
from kvtrain.training.checkpoint_io import StreamedCheckpointIO
from kvtrain.training.csv_logger import CSVMetrics
from kvtrain.training.ranks import require_same_step, together

_KEPT = 2
_RATED_BY = "val_perplexity"


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-XXXXXX.ckpt`` every so many optimizer steps and at the end.

    A checkpoint is written under a temporary name at the end of its step, and gets its own once the step's row of
    metrics is on disk, so that killing the run at any moment leaves a run that can go on and loses no row.
    ``best.ckpt`` names the one with the lowest held-out perplexity, among those whose step was validated: no step is
    saved for it alone. A validation that was due when the run was killed is made up for when it goes on.

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
        self._written_step: int | None = None  # not published yet

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Copy what the optimizer would take over as it is: it must not hold on to a file that will be removed."""
        if trainer.strategy.root_device.type == "cpu" and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = copy.deepcopy(checkpoint["optimizer_states"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is already saved need not be saved again; what a killed process was about to do is done."""
        self.saved_step = trainer.global_step
        require_same_step(trainer)
        resumed = step_path(self.run, trainer.global_step)
        if trainer.fit_loop.epoch_loop.restarting and trainer.strategy.broadcast(resumed.exists()):
            self._finish(trainer, resumed)

    def _finish(self, trainer: pl.Trainer, resumed: Path) -> None:
        rated = False
        with together(trainer):
            if trainer.is_global_zero:
                rated = describe_checkpoint(resumed)["val_perplexity"] is not None
                refresh_best(resumed.parent)
                prune(self.run, _KEPT)
        if not trainer.strategy.broadcast(rated) and is_validation_due(trainer):
            run_validation(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a multiple of ``every`` is reached, and at the last step."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning has logged the metrics of the step that was saved."""
        self.publish(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has logged the metrics of the step that was saved."""
        self.publish(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rate the checkpoint of the step that was validated, where there is one; its figures are logged by now."""
        perplexity = trainer.callback_metrics.get(_RATED_BY)
        if trainer.sanity_checking or trainer.global_step != self.saved_step or perplexity is None:
            return
        with together(trainer):
            if trainer.is_global_zero:
                _sync_metrics(trainer)
                rate_checkpoint(step_path(self.run, trainer.global_step), perplexity.item())
                prune(self.run, _KEPT)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a run that ends between two checkpoints (``max_time``, early stopping)."""
        self.save(trainer)
        self.publish(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A checkpoint that is complete may be kept, where there is room; other ranks cannot be waited for."""
        if self._written_step is None or not trainer.is_global_zero:
            return
        temporary = temporary_name(step_path(self.run, self._written_step))
        if temporary.exists():
            try:
                self._publish(trainer, self._written_step)
            except OSError:
                remove(temporary)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the current step, unless it is saved already; every rank calls it, and ``publish`` after it."""
        step = trainer.global_step
        if step in (self.saved_step, self._written_step) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        final = step_path(self.run, step)
        temporary = temporary_name(final)
        with together(trainer):
            if trainer.is_global_zero:
                final.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(final.parent)
        try:
            self._write(trainer, temporary)
            self._written_step = step
        except BaseException:
            if trainer.is_global_zero:
                remove(temporary)
            raise

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        """As the trainer's ``save_checkpoint``, in which the others would wait for a rank whose disk is full."""
        with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            with together(trainer):
                trainer.strategy.save_checkpoint(checkpoint, path)

    def publish(self, trainer: pl.Trainer) -> None:
        """Give a checkpoint that was written its name, when its step's metrics are logged; every rank calls it."""
        if self._written_step is not None:
            with together(trainer):
                self._publish(trainer, self._written_step)

    def _publish(self, trainer: pl.Trainer, step: int) -> None:
        if trainer.is_global_zero:
            final = step_path(self.run, step)
            temporary, io = temporary_name(final), trainer.strategy.checkpoint_io
            _sync_metrics(trainer)
            digest = io.written.get(temporary) if isinstance(io, StreamedCheckpointIO) else None
            add_checkpoint(temporary, final, digest)
            prune(self.run, _KEPT)
        self._written_step, self.saved_step = None, step


def _sync_metrics(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, CSVMetrics):
            logger.sync()
