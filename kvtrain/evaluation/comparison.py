"""``kvtrain report --compare``: what several methods lose and hold, side by side, from what ``kvtrain eval`` wrote."""

from collections.abc import Sequence
from pathlib import Path

from kvtrain.evaluation.comparison_plots import quality_figure
from kvtrain.evaluation.comparison_points import MIB, Panel, Point, panels_of, pooled, read_points, require_one_measure
from kvtrain.evaluation.page import wide_table, write_page

FOLDER, PAGE = "comparison", "comparison.html"
_TITLE, _WIDTH = "Quality over KV bytes", 960


def compare(files: Sequence[str], output: Path | None = None) -> list[Path]:
    """Draw quality over bytes, one panel a task and a line a method, and write a page that needs no other file.

    Kinds of a task are drawn as one, and stand in tables by themselves.

    Args:
        files: JSON of ``kvtrain eval``, or ``NAME=FILE`` to name its line.
        output: Where figure and page go; ``comparison`` where absent.

    Returns:
        The files written: the PNG, then the page.

    Raises:
        ValueError: A file is missing or damaged, nothing in one says what a cache holds while it answers, or two were
            not measured on the same.
    """
    points = [point for file in files for point in read_points(file)]
    drawn = pooled(points)
    require_one_measure([*points, *drawn])
    figure = quality_figure(drawn)
    folder = Path(FOLDER) if output is None else output
    parts = {**panels_of(drawn), **panels_of(points)}
    tables = [_table(panel, part) for panel, part in parts.items()]
    return write_page(folder, PAGE, _TITLE, {"quality": figure}, after="\n".join(tables), width=_WIDTH)


def _table(panel: Panel, points: Sequence[Point]) -> str:
    """A panel's points as HTML, line by line."""
    columns = ("", "model", "method", "", panel.key, "KV MiB, mean", "at the end", "peak", "of a full cache")
    rows = [
        (
            point.label,
            point.model,
            point.method,
            "plain" if point.plain else "trained" if point.trained else "not trained",
            f"{point.quality:.4g}",
            *(f"{number / MIB:.3f}" for number in (point.mean, point.end, point.peak)),
            "" if point.share is None else f"{point.share:.1%}",
        )
        for point in sorted(points, key=lambda one: (not one.plain, not one.trained, one.label, -one.mean))
    ]
    asked = ", ".join(f"{key} {value}" for key, value in points[0].measured_on.items() if value is not None)
    return wide_table(panel.heading, columns, rows, note=f"Measured on: {asked}.")
