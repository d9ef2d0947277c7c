"""A scheduler that wants its machine back: finish the step, save, and leave, or ask to be started again."""

import logging
import os
import signal
import subprocess
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from kvtrain import stop_signals
from kvtrain.stop_signals import STOPPED_EXIT_CODE, StopSignals
from kvtrain.training.callbacks.checkpoints import RunCheckpoint

_REQUEUE = 1 << 7  # beside the number of a signal
_LOOK_EVERY = 8  # batches of a validation on several ranks, which have to ask each other
logger = logging.getLogger("kvtrain")


class Preemption(pl.Callback):
    """Saves at the end of the current optimizer step after SIGTERM, SIGUSR1 or SIGHUP, and leaves with exit code 143.

    All ranks leave after the same step, also where one of them alone has got the signal. Under SLURM the signal that
    comes ahead of the job's end (SIGUSR1) has the job queued again, as with Lightning alone; but Lightning would write
    a checkpoint of its own in the middle of a step and train on, and leave after a SIGTERM without saving, with exit
    code 0, which a scheduler takes for success.
    """

    def __init__(self) -> None:
        self._signals: StopSignals | None = None
        self._own: StopSignals | None = None  # where no command line listens
        self._request = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save; and Lightning has put handlers of its own in place."""
        if stop_signals.current() is None:
            self._own = StopSignals().__enter__()
        self._signals = stop_signals.current()
        if self._signals is not None:
            self._signals.training = True
            self._signals.take_over()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step, save; one rank's signal counts for all."""
        if self._signals is not None:
            self._signals.require_running()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        asked = self._signals.asked if self._signals is not None else None
        self._request = _strongest(trainer, _request(trainer, asked))
        if self._request and (saver := _saver(trainer)):
            saver.save(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave, now that Lightning has logged the metrics of the last step."""
        self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave before a validation, which may last longer than the scheduler waits; it is made up for."""
        self._leave(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave in the middle of a validation, too, where the step before it is saved; all ranks look now and then."""
        saver = _saver(trainer)
        if self._signals is None or saver is None or saver.saved_step != trainer.global_step:
            return
        if trainer.world_size == 1 or (batch_idx + 1) % _LOOK_EVERY == 0:
            self._request = _strongest(trainer, _request(trainer, self._signals.asked))
            self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._let_go()

    def _let_go(self) -> None:
        if self._own is not None:
            self._own.__exit__(None, None, None)
        self._own = self._signals = None

    def _leave(self, trainer: pl.Trainer) -> None:
        if not self._request:
            return
        if saver := _saver(trainer):
            saver.publish(trainer)
        outcome = "saved; continue with --ckpt_path last" if saver else "nothing saved (checkpoints are off)"
        name = signal.Signals(self._request % _REQUEUE).name
        logger.warning("%s at step %d: %s", name, trainer.global_step, outcome)
        if self._request > _REQUEUE and trainer.is_global_zero:
            requeue()
        raise SystemExit(STOPPED_EXIT_CODE)


def _saver(trainer: pl.Trainer) -> RunCheckpoint | None:
    return next((callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)), None)


def _request(trainer: pl.Trainer, asked: signal.Signals | None) -> int:
    """What this rank is asked for, as a number: nothing, to stop, or, above these, to be queued again as well."""
    if asked is None:
        return 0
    cluster = trainer._accelerator_connector.cluster_environment
    if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue and asked == cluster.requeue_signal:
        return asked + _REQUEUE
    return int(asked)


def _strongest(trainer: pl.Trainer, request: int) -> int:
    """The largest request of all ranks; each has its own signals."""
    if trainer.world_size == 1:
        return request
    everyone = torch.tensor(float(request), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(everyone, reduce_op="max").item())


def requeue() -> None:
    """Have SLURM put this job back into its queue; where it does not, the checkpoint is there all the same."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        fault = answer.stderr.strip() or f"exit code {answer.returncode}" if answer.returncode else None
    except OSError as error:
        fault = str(error)
    if fault:
        logger.warning("scontrol requeue %s: %s; submit the job again", job, fault)
    else:
        logger.warning("SLURM job %s is queued again", job)
