"""Tokens per second over all ranks."""

import time
from typing import Any

import lightning.pytorch as pl

_WINDOW = 20


class Throughput(pl.Callback):
    """Logs ``tokens_per_second``, the mean over the last optimiser steps, pads excluded."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []
        self._tokens = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; at the end of an optimiser step, log."""
        self._tokens += int((batch["document_ids"] > 0).sum()) * trainer.world_size
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._marks = [*self._marks[-_WINDOW:], (time.monotonic(), self._tokens)]
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        if last > first:
            pl_module.log("tokens_per_second", (after - before) / (last - first), prog_bar=True)
