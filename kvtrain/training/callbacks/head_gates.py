"""Which heads a model is about to keep whole."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kvtrain.metrics import GATES_FILE_NAME
from kvtrain.training.csv_logger import rows_before, write_rows


class HeadGates(pl.Callback):
    """Writes ``head_gates.csv``: every head's gate at every validation.

    A validation adds a row a head: ``step`` as in ``metrics.csv``, ``layer``, ``head``, ``gate``, and ``full``, 1 where
    the head would keep everything if gates were rounded now.

    Args:
        run: Run folder.
        read_gates: Called on every rank; gates ``(layers, H_kv)``, and as they would be rounded now.
    """

    def __init__(self, run: Path, read_gates: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._read_gates = read_gates
        self.path = run / GATES_FILE_NAME
        self._rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the rows of the steps that a resumed run has behind it."""
        if trainer.is_global_zero:
            self._rows = rows_before(self.path, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write; gates are gathered by every rank."""
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trial:
            return
        gates, full = self._read_gates()
        if trainer.is_global_zero:
            step = trainer.global_step - 1
            self._rows = [row for row in self._rows if row["step"] != step]  # a validation may be made up for
            self._rows += _rows(step, gates, full)
            write_rows(self.path, self._rows)


def _rows(step: int, gates: Tensor, full: Tensor) -> list[dict[str, float]]:
    """One for every head of ``(layers, H_kv)``."""
    return [
        {"step": step, "layer": layer, "head": head, "gate": gate, "full": int(full[layer, head])}
        for layer, heads in enumerate(gates.tolist())
        for head, gate in enumerate(heads)
    ]
