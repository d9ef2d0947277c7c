"""``metrics.csv``: one row a step, one column a metric, and a resumed run goes on in the same file.

Other tables of a run, whose rows belong to steps too, are written and taken up again in the same way.
"""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from kvtrain.durable import replacing, sync
from kvtrain.metrics import METRICS, read_rows


class CSVMetrics(Logger):
    """Writes the metrics of a run into its folder.

    Args:
        folder: Run folder.
        flush_rows: Rows after which the file is written again.
    """

    def __init__(self, folder: str, flush_rows: int = 20) -> None:
        super().__init__()
        self.folder, self.flush_rows = Path(folder), flush_rows
        self._rows: dict[int, dict[str, float]] = {}
        self._unsaved = 0

    @property
    def name(self) -> str:
        """No sub-folder: everything of a run lies in one place."""
        return ""

    @property
    def version(self) -> str:
        """No version: a run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: the resolved configuration lies beside the metrics."""

    @rank_zero_only
    def take_up(self, steps_done: int) -> None:
        """Go on with the rows of the steps that a run has behind it; what an earlier process logged later is dropped.

        Raises:
            ValueError: The table is damaged.
        """
        self._rows = {int(row["step"]): row for row in rows_before(self.folder / METRICS.name, steps_done)}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to a step's row."""
        step = step or 0
        row = self._rows.setdefault(step, {"step": step})
        row.update({key: float(value) for key, value in metrics.items() if key != "epoch"})
        self._unsaved += 1
        if self._unsaved >= self.flush_rows:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the file; a reader never sees half of it."""
        if not self._rows or not self._unsaved:
            return
        write_rows(self.folder / METRICS.name, [self._rows[step] for step in sorted(self._rows)])
        self._unsaved = 0

    @rank_zero_only
    def sync(self) -> None:
        """Write the file and wait for the disk."""
        self.save()
        path = self.folder / METRICS.name
        if path.is_file():
            sync(path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()


def rows_before(path: Path, step: int) -> list[dict[str, float]]:
    """Rows of earlier steps than ``step``, at which a run goes on; none where there is no table yet.

    Raises:
        ValueError: The table is damaged.
    """
    return [row for row in read_rows(path) if row["step"] < step] if path.is_file() else []


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write a table, one column for every key; a reader never sees half of it.

    Raises:
        OSError: It cannot be written.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, synced=False) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
