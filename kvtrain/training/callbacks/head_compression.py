"""What every layer and head decides: where a model compresses."""

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kvtrain.metrics import HEADS_FILE_NAME
from kvtrain.training.csv_logger import rows_before, write_rows


class HeadCompression(pl.Callback):
    """Writes ``head_compression.csv``: how much each layer and key-value head merges of the held-out rows.

    Every validation adds a row a head: ``step`` as in ``metrics.csv``, ``layer``, ``head`` and ``merged_fraction``,
    of the tokens that had a choice. The module counts each held-out batch; a phase without decisions adds nothing.

    Args:
        run: Run folder.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / HEADS_FILE_NAME
        self._rows: list[dict[str, float]] = []
        self._counts = False
        self._merged: dict[int, Tensor] = {}  # by layer, (H_kv,)
        self._free: Tensor = torch.zeros(())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the rows of the steps that a resumed run has behind it."""
        if trainer.is_global_zero:
            self._rows = rows_before(self.path, trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count, unless this is a trial or no training is under way."""
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        self._counts = trainer.state.fn == TrainerFn.FITTING and not trial
        self._merged, self._free = {}, torch.zeros((), dtype=torch.float64, device=pl_module.device)

    def count(self, decisions: Mapping[int, Tensor], free: Tensor) -> None:
        """Add up a held-out batch.

        Args:
            decisions: Hard ones ``(B, H_kv, T)`` by layer.
            free: ``(B, T)`` tokens that had a choice.
        """
        if not self._counts:
            return
        self._free += free.sum()
        for layer, merges in decisions.items():
            merged = (merges.double() * free[:, None]).sum((0, 2))
            self._merged[layer] = merged + self._merged[layer] if layer in self._merged else merged

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, over all ranks."""
        if not self._counts or not self._merged:
            return
        layers = sorted(self._merged)
        sums = torch.stack([self._merged[layer] for layer in layers])  # (L, H_kv)
        everyone = trainer.strategy.reduce(torch.cat([sums.flatten(), self._free[None]]), reduce_op="sum")
        fractions = (everyone[:-1] / everyone[-1]).view_as(sums).tolist()
        if trainer.is_global_zero:
            step = trainer.global_step - 1
            self._rows = [row for row in self._rows if row["step"] != step]  # a validation may be made up for
            self._rows += [
                {"step": step, "layer": layer, "head": head, "merged_fraction": fraction}
                for layer, heads in zip(layers, fractions, strict=True)
                for head, fraction in enumerate(heads)
            ]
            write_rows(self.path, self._rows)
