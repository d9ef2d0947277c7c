"""Reading ``metrics.csv`` and its like, which training writes and reports draw."""

import csv
from pathlib import Path

FILE_NAME = "metrics.csv"
HEADS_FILE_NAME = "head_compression.csv"
GATES_FILE_NAME = "head_gates.csv"
MAP_FILE_NAME = "kv_map.csv"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's ``metrics.csv``, without the empty cells.

    Raises:
        ValueError: The run has none, or it is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: no {FILE_NAME}; is this a run folder of `kvtrain fit`?")
    return read_rows(path)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Rows of a table of numbers, without the empty cells; whole numbers are ``int``.

    Raises:
        ValueError: It is damaged.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{key: _number(value) for key, value in row.items() if value} for row in rows]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)
