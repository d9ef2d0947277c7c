"""How much memory a run has needed, on the rank that needed most."""

import resource
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

_GIB = 2**30
_STATUS = Path("/proc/self/status")


class PeakMemory(pl.Callback):
    """Logs ``peak_memory_gib`` at the logging interval, the maximum over ranks.

    On CUDA what torch had allocated at most; elsewhere the most that the process has had in memory since it
    started, torch's own code included.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of an optimizer step that is logged, log."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not every or trainer.global_step % every:
            return
        device = pl_module.device
        size = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
        largest = trainer.strategy.reduce(torch.tensor(size / _GIB, device=device), reduce_op="max")
        pl_module.log("peak_memory_gib", largest)


def peak_resident_bytes() -> int:
    """The most physical memory that this process has had at a time."""
    if _STATUS.is_file():  # Linux' resource usage would tell of the process that started this one, too
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
