"""What every layer and head decides: where a model compresses."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvtrain.losses.compression import free_to_merge
from kvtrain.metrics import HEADS_FILE_NAME
from kvtrain.training.base import Ledger
from kvtrain.training.csv_logger import rows_before, write_rows


class HeadCompression(pl.Callback):
    """Writes ``head_compression.csv``: how much each layer and key-value head merges of the held-out rows.

    Every validation adds a row a head: ``step`` as in ``metrics.csv``, ``layer``, ``head`` and ``merged_fraction``,
    of the tokens that had a choice. Decisions are read from the ``ledger`` that a module gives its model; a module
    without one, or a phase without decisions, adds nothing.

    Args:
        run: Run folder.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / HEADS_FILE_NAME
        self._rows: list[dict[str, float]] = []
        self._watch: RemovableHandle | None = None
        self._merged: dict[int, Tensor] = {}  # by layer, (H_kv,)
        self._free: Tensor = torch.zeros(())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the rows of the steps that a resumed run has behind it."""
        if trainer.is_global_zero:
            self._rows = rows_before(self.path, trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the model while it reads the held-out rows."""
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trial:
            return
        model = pl_module.model
        assert isinstance(model, nn.Module)
        self._merged, self._free = {}, torch.zeros((), dtype=torch.float64, device=pl_module.device)
        self._watch = model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, __: Any, arguments: dict[str, Any], ___: Any) -> None:
        """Add up a batch's decisions, which are hard and ``(B, H_kv, T)`` a layer."""
        ledger: Ledger = arguments.get("ledger") or Ledger()
        if not ledger:
            return
        free = free_to_merge(arguments["document_ids"])
        self._free += free.sum()
        for layer, decisions in ledger.items():
            merged = (decisions.double() * free[:, None]).sum((0, 2))
            self._merged[layer] = merged + self._merged[layer] if layer in self._merged else merged

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, over all ranks."""
        if self._watch is None:
            return
        self._watch.remove()
        self._watch = None
        if not self._merged:
            return
        layers = sorted(self._merged)
        sums = torch.stack([self._merged[layer] for layer in layers])  # (L, H_kv)
        everyone = trainer.strategy.reduce(torch.cat([sums.flatten(), self._free[None]]), reduce_op="sum")
        fractions = (everyone[:-1] / everyone[-1]).view_as(sums).tolist()
        if trainer.is_global_zero:
            self._rows += [
                {"step": trainer.global_step - 1, "layer": layer, "head": head, "merged_fraction": fraction}
                for layer, heads in zip(layers, fractions, strict=True)
                for head, fraction in enumerate(heads)
            ]
            write_rows(self.path, self._rows)
