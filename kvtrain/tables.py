"""Tables on a terminal."""

import sys
from collections.abc import Iterable
from typing import Any


def cell(value: Any) -> str:
    """A value as a table shows it: a number with four digits, or all that it has before the point."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows below their headings; as wide as the terminal, or 160 characters where there is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for column in table.columns:
        column.overflow = "fold"  # names, paths and figures are there to be copied
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False, markup=False).print(table)
