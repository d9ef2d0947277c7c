"""Empty figures, their colors and their marks: what all figures of a report have in common."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's, distinct to the colour-blind and in print
# Seven of Okabe and Ito's, and as many marks less one, so that a color comes back with another mark.
COLOR_CYCLE = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY)
MARKER_CYCLE = ("o", "s", "^", "D", "v", "P")
COLORS = matplotlib.colormaps["viridis"]  # even in lightness, and distinct to the colour-blind
WIDTH, HEIGHT = 7.2, 4.2  # inches
MOST_MARKS = 16  # for which an axis has room

_STEPS = "optimizer step"
_ROW_HEIGHT, _MARGIN = 0.22, 1.3  # inches


def canvas(title: str, quantity: str, over: str = _STEPS) -> tuple[Figure, Axes]:
    """A figure of one empty panel with a grid.

    Args:
        title: Above it.
        quantity: Up its side.
        over: Along its foot.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, title, quantity, over)
    return figure, axes


def canvas_of_rows(title: str, rows: int, least: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one bare panel, high enough for a line of text in each row.

    Args:
        title: Above it.
        rows: Such as layers.
        least: Height in inches.
    """
    figure = Figure(figsize=(WIDTH, max(least, _ROW_HEIGHT * rows + _MARGIN)), layout="constrained")
    axes = figure.add_subplot()
    _entitle(axes, title)
    return figure, axes


def dress(axes: Axes, title: str, quantity: str, over: str = _STEPS) -> None:
    """Title, names and grid of an empty panel; the arguments are those of ``canvas``."""
    _entitle(axes, title)
    axes.set_xlabel(over, fontsize=11)
    axes.set_ylabel(quantity, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=10)


def _entitle(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")


def marks(numbers: Sequence[int]) -> Sequence[int]:
    """As many of these numbers as an axis has room for, evenly spaced."""
    return numbers[:: -(-len(numbers) // MOST_MARKS)]


def arc(axes: Axes, begin: int, end: int, style: str, color: str) -> None:
    """A curve on the left between two places of the vertical axis, wider the further they are apart.

    Args:
        axes: Where to draw; the arc stays between -0.95 and 0.
        begin: Such as a layer.
        end: Such as the layer that it reads.
        style: Of the line, as matplotlib writes it.
        color: Of the line.
    """
    angles = np.linspace(np.pi / 2, 3 * np.pi / 2, 40)
    middle, reach = (begin + end) / 2, abs(begin - end) / 2
    width = 0.15 + 0.8 * (1 - math.exp(-reach / 4))
    axes.plot(width * np.cos(angles), middle + reach * np.sin(angles), style, color=color, linewidth=1.3, zorder=0)
