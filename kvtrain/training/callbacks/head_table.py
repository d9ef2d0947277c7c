"""A number of every head, at every validation, in a table of the run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kvtrain.metrics import Table
from kvtrain.training.csv_logger import rows_before, write_rows

ByLayer = Mapping[int, Mapping[str, Tensor]]  # columns of a layer by name, (H_kv,) each


class HeadTable(pl.Callback, ABC):
    """Adds a row a head to a table whenever a run is validated while it trains.

    A row holds ``step`` as in ``metrics.csv``, ``layer``, ``head``, and what ``measure`` found.

    Args:
        run: Run folder.
        table: Which of its tables; says the columns.
    """

    def __init__(self, run: Path, table: Table) -> None:
        self.path, self.columns = run / table.name, table.columns
        self._rows: list[dict[str, float]] = []

    @abstractmethod
    def measure(self, trainer: pl.Trainer) -> ByLayer:
        """What is written after a validation; called on every rank, and the same on all of them.

        Returns:
            Columns by layer; nothing where there is nothing to write.
        """

    @staticmethod
    def records(trainer: pl.Trainer) -> bool:
        """Whether a validation is one that is written down: no trial, and training is under way."""
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        return trainer.state.fn == TrainerFn.FITTING and not trial

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the rows of the steps that a resumed run has behind it."""
        if trainer.is_global_zero:
            self._rows = rows_before(self.path, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and write."""
        if not self.records(trainer):
            return
        found = self.measure(trainer)
        if found and trainer.is_global_zero:
            step = trainer.global_step - 1
            self._rows = [row for row in self._rows if row["step"] != step]  # a validation may be made up for
            self._rows += _head_rows(step, found)
            assert self._rows[-1].keys() == set(self.columns), "the table is read by its columns"
            write_rows(self.path, self._rows)


def _head_rows(step: int, found: ByLayer) -> list[dict[str, float]]:
    """One for every head of every layer."""
    return [
        {"step": step, "layer": layer, "head": head, **dict(zip(columns, numbers, strict=True))}
        for layer, columns in found.items()
        for head, numbers in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True))
    ]
