"""Tokens per second, waiting for data, memory, and the share of the devices' peak: what a run needs, over all ranks."""

import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.training.base import TrainingModule
from kvtrain.training.callbacks.memory import peak_bytes
from kvtrain.training.flops import TrainingFlops, peak_flops, training_flops
from kvtrain.training.strategies.base import traits

_WINDOW = 20
_GIB = 2**30


class _Mark(NamedTuple):
    """The end of an optimizer step on this rank.

    Attributes:
        time: In seconds.
        tokens: So far, on the device: reading them waits for it.
        waited: Seconds so far in which steps waited for the loader.
    """

    time: float
    tokens: Tensor
    waited: float


class Throughput(pl.Callback):
    """Logs, where metrics are logged, means over the last optimizer steps, pads excluded and validations too.

    ``tokens_per_second`` is the sum over ranks; with several of them ``tokens_per_second_least`` and
    ``tokens_per_second_most`` are those of single ranks. ``data_wait`` is how many seconds of a step the rank that
    waited longest waited for its loader, ``peak_memory_gib`` the most that any rank has had in use: on CUDA what torch
    had allocated, elsewhere what the process had in memory since it started, torch's own code included.

    Where a device's peak is known, its use is ``mfu`` (what training needs) and ``hfu`` (recomputed layers and a
    teacher's forward pass included); ``kvtrain.training.flops`` says what is counted.

    Between those steps no rank waits for another, nor for its device.

    Args:
        peak: Dense FLOP/s of one device in the precision of the run; None looks the device up.

    Raises:
        ValueError: ``peak`` is not positive.
    """

    def __init__(self, peak: float | None = None) -> None:
        if peak is not None and peak <= 0:
            raise ValueError(f"trainer.peak_flops must be positive, not {peak}")
        self.peak = peak
        self._marks: list[_Mark] = []
        self._tokens = torch.tensor(0)
        self._flops: TrainingFlops | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look the device up."""
        self.peak = self.peak or peak_flops(trainer.strategy.root_device, trainer.precision)
        self._tokens = self._tokens.to(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new mean: the time of a validation is no training's."""
        self._marks = [self._marks[-1]._replace(time=time.monotonic())] if self._marks else []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; at the end of an optimizer step that is logged, log."""
        self._tokens = self._tokens + (batch["document_ids"] > 0).sum()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        waited: float = getattr(trainer.train_dataloader, "seconds_waited", 0.0)
        self._marks = [*self._marks[-_WINDOW:], _Mark(time.monotonic(), self._tokens, waited)]
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._log(pl_module, batch["input_ids"].shape[1])

    def _log(self, module: pl.LightningModule, sequence_length: int) -> None:
        """One small exchange between the ranks."""
        first, last, steps = self._marks[0], self._marks[-1], len(self._marks) - 1
        shared = traits(module.trainer).context_parallel
        seconds, tokens = last.time - first.time, float(last.tokens - first.tokens) / shared
        speed = tokens / seconds if seconds > 0 else 0.0
        own = [speed, (last.waited - first.waited) / max(1, steps), peak_bytes(module.device) / _GIB]
        gathered = module.all_gather(torch.tensor(own, device=module.device))
        assert isinstance(gathered, Tensor)
        speeds, waits, sizes = gathered.reshape(-1, len(own)).unbind(1)  # (ranks,) each
        module.log("peak_memory_gib", sizes.max())
        if not steps:
            return
        module.log("tokens_per_second", speeds.sum(), prog_bar=True)
        if len(speeds) > 1:
            module.log("tokens_per_second_least", speeds.min())
            module.log("tokens_per_second_most", speeds.max())
        module.log("data_wait", waits.max())
        self._log_utilisation(module, float(speeds.mean()), sequence_length)

    def _log_utilisation(self, module: pl.LightningModule, speed: float, sequence_length: int) -> None:
        """Of one device, from its tokens per second."""
        if self.peak is None:
            return
        if self._flops is None:
            assert isinstance(module, TrainingModule)
            self._flops = training_flops(module.model, sequence_length, teacher=module.teacher_model())
        module.log("mfu", speed * self._flops.model / self.peak, prog_bar=True)
        module.log("hfu", speed * self._flops.hardware / self.peak)
