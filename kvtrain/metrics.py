"""Reading ``metrics.csv``, which training writes and reports draw."""

import csv
from pathlib import Path

FILE_NAME = "metrics.csv"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's ``metrics.csv``, without the empty cells.

    Raises:
        ValueError: The run has none, or it is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: no {FILE_NAME}; is this a run folder of `kvtrain fit`?")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{key: float(value) for key, value in row.items() if value} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
