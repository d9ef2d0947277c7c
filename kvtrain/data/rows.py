"""Rows of files, one at a time, each with its place for messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtrain.errors import first_line

Row = tuple[Any, str]  # what a file holds there, and where that is
_PARQUET_BATCH_ROWS = 256


def jsonl_rows(path: Path) -> Iterator[Row]:
    """JSON of every line that is not empty; rows are numbered as lines.

    Raises:
        ValueError: A line is not JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                source = f"{path} row {number}"
                yield parse_json(line.rstrip(), source), source


def require_encodable(text: str, where: str) -> None:
    """Refuse text that no file can hold.

    Raises:
        ValueError: It has half of a surrogate pair, as escapes in JSON may.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a surrogate pair, not text") from error


def parse_json(data: bytes, source: str) -> Any:
    """JSON text, or why it is none.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text; convert it first") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if b"\n" in data else ""
        raise ValueError(f"{source}: not JSON ({error.msg}, {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"{source}: not JSON that can be read ({first_line(error)})") from error


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Rows as dictionaries, a few in memory at a time.

    Args:
        path: Parquet file.
        column: The only one to read; None reads all.

    Raises:
        ValueError: The file cannot be read, has no such column, or text in it is not UTF-8.
    """
    import pyarrow

    number = 0
    try:
        for batch in _parquet_batches(path, column):
            names, columns = batch.schema.names, batch.columns
            for place in range(batch.num_rows):
                number += 1  # cell by cell, so that text which is not UTF-8 has a row
                row = {name: cells[place].as_py() for name, cells in zip(names, columns, strict=True)}
                yield row, f"{path} row {number}"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} row {number}: not UTF-8 text; convert it first") from error
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{path} after row {number}" if number else str(path)
        raise ValueError(f"{where}: not a readable parquet file ({first_line(error)})") from error


def _parquet_batches(path: Path, column: str | None) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise ValueError(missing_column(str(path), column, names))
        yield from file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[column] if column else None)


def missing_column(source: str, text_column: str, names: list[str]) -> str:
    """What to say where the field with the text is not there."""
    return f"{source}: no column {text_column!r}; set text_column to one of {', '.join(map(repr, names))}"
