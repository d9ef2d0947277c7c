"""What every layer and head decides: where a model compresses."""

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.models.gating import HEAD_COMPRESSION
from kvtrain.training.callbacks.head_table import ByLayer, HeadTable


class HeadCompression(HeadTable):
    """Writes ``head_compression.csv``: how much each layer and key-value head merges of the held-out rows.

    ``merged_fraction`` is of the tokens that had a choice. The module counts each held-out batch; a phase without
    decisions adds nothing.

    Args:
        run: Run folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(run, HEAD_COMPRESSION)
        self._counts = False
        self._merged: dict[int, Tensor] = {}  # by layer, (H_kv,)
        self._free: Tensor = torch.zeros(())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count, where it will be written."""
        self._counts = self.records(trainer)
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

    def measure(self, trainer: pl.Trainer) -> ByLayer:
        """Fractions of the rows of all ranks."""
        if not self._merged:
            return {}
        layers = sorted(self._merged)
        sums = torch.stack([self._merged[layer] for layer in layers])  # (L, H_kv)
        everyone = trainer.strategy.reduce(torch.cat([sums.flatten(), self._free[None]]), reduce_op="sum")
        fractions = (everyone[:-1] / everyone[-1]).view_as(sums)
        return {layer: {"merged_fraction": heads} for layer, heads in zip(layers, fractions, strict=True)}
