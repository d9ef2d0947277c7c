"""Maps of layers and heads: a number of each as a color, and written into its cell."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from kvtrain.metrics import Rows
from kvtrain.plotting.canvas import COLORS, HEIGHT, MOST_MARKS, canvas_of_rows, marks

Grid = npt.NDArray[np.float64]  # (layers, heads), or any part of it


def last_validation(rows: Rows) -> tuple[int, Rows]:
    """The latest step of a table by steps and heads, and its rows.

    Args:
        rows: At least one, each with its ``step``.
    """
    step = max(row["step"] for row in rows)
    return int(step), [row for row in rows if row["step"] == step]


def head_map(rows: Rows, column: str) -> Grid:
    """A column of one step as ``(layers, heads)``; NaN, which stays white, where a layer was not written.

    Args:
        rows: One a head, with ``layer`` and ``head``.
        column: What they hold besides.
    """
    shape = (int(max(row["layer"] for row in rows)) + 1, int(max(row["head"] for row in rows)) + 1)
    values = np.full(shape, np.nan)
    for row in rows:
        values[int(row["layer"]), int(row["head"])] = row[column]
    return values


def draw_map(values: Grid, title: str, scale: Normalize) -> tuple[Figure, Axes, AxesImage]:
    """A figure of numbers as colors.

    Args:
        values: ``(layers, heads)``.
        title: Above it.
        scale: From numbers to shades.
    """
    layers, columns = values.shape
    figure, axes = canvas_of_rows(title, layers, least=HEIGHT - 1)
    image = axes.imshow(values, cmap=COLORS, norm=scale, aspect="auto", interpolation="nearest")
    axes.set_xlabel("key-value head", fontsize=11)
    axes.set_ylabel("layer", fontsize=11)
    axes.set_xticks(marks(range(columns)))
    axes.set_yticks(marks(range(layers)))
    axes.spines[:].set_visible(False)
    return figure, axes, image


def write_numbers(image: AxesImage, values: Grid, written: Callable[[float], str]) -> None:
    """The number that a color stands for into every cell; into none where heads are so many that cells are too small.

    Args:
        image: Of ``draw_map``.
        values: What it shows.
        written: The text of a number.
    """
    if values.shape[1] > MOST_MARKS:
        return
    tones = np.asarray(image.norm(values), dtype=np.float64)
    for (layer, head), value in np.ndenumerate(values):
        if not math.isnan(value):
            color = "white" if tones[layer, head] < 0.6 else "black"
            image.axes.text(head, layer, written(value), color=color, fontsize=8, ha="center", va="center")
