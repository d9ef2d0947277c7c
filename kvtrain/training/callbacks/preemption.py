"""SIGTERM, the word of a scheduler that wants its machine back: finish the step, save, exit 143."""

import logging
import signal
import threading
from typing import Any

import lightning.pytorch as pl

from kvtrain.training.callbacks.checkpoints import RunCheckpoint

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
logger = logging.getLogger("kvtrain")


class Preemption(pl.Callback):
    """Saves at the end of the current optimizer step after a SIGTERM and leaves with exit code 143.

    Lightning 2.6 would leave without saving, with exit code 0, which a scheduler takes for success.
    """

    def __init__(self) -> None:
        self.requested = False
        self._leaving = False

    def _note(self, *_: Any) -> None:
        self.requested = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signal over from Lightning, which gives the original handler back at the end."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, save; one rank's signal counts for all."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._leaving = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        if not self._leaving:
            return
        saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None)
        if saver is not None:
            saver.save(trainer)
        outcome = "saved; continue with --ckpt_path last" if saver else "nothing saved (checkpoints are off)"
        logger.warning("SIGTERM at step %d: %s", trainer.global_step, outcome)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave, now that Lightning has logged the metrics of the last step."""
        self._leave()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave before a validation, which may last longer than the scheduler waits."""
        self._leave()

    def _leave(self) -> None:
        if self._leaving:
            raise SystemExit(SIGTERM_EXIT_CODE)
