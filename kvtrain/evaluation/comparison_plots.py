"""Quality over bytes: a panel a task, a line a method."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvtrain.evaluation.comparison_points import MIB, Panel, Point, panels_of
from kvtrain.plotting.canvas import COLOR_CYCLE, GREY, HEIGHT, MARKER_CYCLE, WIDTH, dress

_LEGEND_WIDTH = 2.6  # inches
_APART = 1.02  # a peak is another mark where it is so much above the mean
_ROW = 0.26  # inches that a line of the legend takes


def quality_figure(points: Sequence[Point]) -> Figure:
    """The panels that there are points of, under each other, and one legend for all.

    Args:
        points: At least one.
    """
    panels = panels_of(points)
    labels = sorted({point.label for point in points if not point.plain})
    styles = dict(zip(labels, zip(cycle(COLOR_CYCLE), cycle(MARKER_CYCLE), strict=False), strict=False))
    height = max(len(panels) * HEIGHT, _ROW * (len(labels) + 6))
    figure = Figure(figsize=(WIDTH + _LEGEND_WIDTH, height), layout="constrained")
    for axes, (panel, part) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _draw_panel(axes, panel, part, styles)
    figure.legend(handles=_legend(points, styles), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: Panel, points: Sequence[Point], styles: Mapping[str, tuple[str, str]]) -> None:
    """Lines of methods, the plain model as a star, and a thin mark where a peak lies apart from its mean."""
    dress(
        axes, panel.heading, f"{panel.key} ({panel.better} is better)", "KV cache of a row while it answers, mean, MiB"
    )
    for name, (color, marker) in styles.items():
        for trained in (False, True):
            line = sorted((p for p in points if (p.label, p.trained) == (name, trained)), key=lambda p: p.mean)
            axes.plot(
                [point.mean / MIB for point in line],
                [point.quality for point in line],
                **_style(color, marker, trained),
            )
    for point in points:
        color = GREY if point.plain else styles[point.label][0]
        if point.plain:
            axes.plot(point.mean / MIB, point.quality, "*", color="black", markersize=13, zorder=4)
        if point.peak > _APART * point.mean:
            axes.plot(point.peak / MIB, point.quality, "|", color=color, markersize=9, alpha=0.8)
    if panel.better == "higher":  # a share
        axes.set_ylim(-0.04, 1.04)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _style(color: str, marker: str, trained: bool) -> dict[str, Any]:
    """What is trained is drawn through and filled."""
    filled = color if trained else "white"
    return {
        "color": color,
        "marker": marker,
        "markerfacecolor": filled,
        "linestyle": "-" if trained else "--",
        "linewidth": 1.6,
        "markersize": 6,
    }


def _legend(points: Sequence[Point], styles: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    """A line a method, trained ones first, and what the marks mean."""
    stars = sorted({point.label for point in points if point.plain})
    star: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 11, "linestyle": ""}
    handles = [Line2D([], [], label=_as_text(name), **star) for name in stars]
    kinds = sorted({(not point.trained, point.label) for point in points if not point.plain})
    handles += [
        Line2D([], [], label=_as_text(name), **_style(*styles[name], not untrained)) for untrained, name in kinds
    ]
    meanings = {"trained": True, "not trained": False}
    handles += [Line2D([], [], label=text, **_style(GREY, "", filled)) for text, filled in meanings.items()]
    if any(point.peak > _APART * point.mean for point in points):
        handles.append(Line2D([], [], label="most bytes ever held", color=GREY, marker="|", markersize=9, linestyle=""))
    return handles


def _as_text(name: str) -> str:
    """As it stands: a dollar sign would begin a formula, and what begins with an underscore be left out."""
    return f" {name}".replace("$", r"\$")
