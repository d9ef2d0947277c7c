"""Tables of numbers in a run folder, ``metrics.csv`` and its like, which training writes and reports draw."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Rows = Sequence[dict[str, float]]


def _no_fault(rows: Rows) -> None:
    """Nothing is wrong with rows that hold their columns."""


@dataclass(frozen=True)
class Table:
    """A table that training writes into a run folder.

    Attributes:
        name: Of its file.
        columns: Without any of which a row is damaged.
        find_fault: What is wrong with rows that have them all, in a few words; None where nothing is.
    """

    name: str
    columns: tuple[str, ...]
    find_fault: Callable[[Rows], str | None] = _no_fault

    def read(self, run: Path) -> Rows:
        """Its rows in a run, without the empty cells; none where the run has no such table.

        Raises:
            ValueError: It is damaged.
        """
        path = run / self.name
        rows = read_rows(path) if path.is_file() else []
        incomplete = any(not row.keys() >= set(self.columns) for row in rows)
        fault = f"a row without {', '.join(self.columns)}" if incomplete else self.find_fault(rows)
        if fault:
            raise ValueError(f"{path}: damaged ({fault})")
        return rows


METRICS = Table("metrics.csv", ("step",))


def read_metrics(run: Path) -> Rows:
    """Rows of a run's ``metrics.csv``, without the empty cells.

    Raises:
        ValueError: The run has none, or it is damaged.
    """
    if not (run / METRICS.name).is_file():
        raise ValueError(f"{run}: no {METRICS.name}; is this a run folder of `kvtrain fit`?")
    return METRICS.read(run)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Rows of a table of numbers, without the empty cells; whole numbers are ``int``.

    Raises:
        ValueError: It is damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [{key: _number(value) for key, value in row.items() if value} for row in rows]
    except (AttributeError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)
