"""Figures of a training run. Each function takes the run's metrics and returns a figure that nobody has saved yet."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]

# Okabe and Ito's palette: distinct to the colour-blind, and in print.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#555555"

_SIZE = (7.2, 4.2)  # inches
_WINDOWS = 20  # a smoothed curve averages over the twentieth part of its points
_FEW = 60  # up to so many held-out points each gets a marker


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged.

    Attributes:
        steps: Optimiser steps, counted from 0.
        values: As many values.
    """

    steps: list[float]
    values: list[float]

    @classmethod
    def of(cls, rows: Rows, column: str) -> "Curve":
        """The curve of one column; empty where it was never logged."""
        points = [(row["step"], row[column]) for row in rows if column in row]
        return cls([step for step, _ in points], [value for _, value in points])

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def last(self) -> float:
        """The latest value."""
        return self.values[-1]

    def smoothed(self) -> "Curve":
        """The mean of each point and those just before it."""
        window = max(1, len(self.values) // _WINDOWS)
        tails = (self.values[max(0, end - window) : end] for end in range(1, len(self.values) + 1))
        return Curve(self.steps, [sum(tail) / len(tail) for tail in tails])


def loss_figure(rows: Rows) -> Figure:
    """Training loss, raw and smoothed, with the held-out loss where there is one.

    Args:
        rows: Rows of ``metrics.csv``.

    Raises:
        ValueError: The run logged neither ``loss`` nor ``val_loss``.
    """
    training, held_out = Curve.of(rows, "loss"), Curve.of(rows, "val_loss")
    if not training and not held_out:
        raise ValueError("the metrics hold no loss")
    figure, axes = _canvas("Loss", "nats per token")
    if training:
        smooth = training.smoothed()
        axes.plot(training.steps, training.values, color=BLUE, alpha=0.3, linewidth=1, label="training")
        axes.plot(smooth.steps, smooth.values, color=BLUE, linewidth=2, label="training, smoothed")
    _points(axes, held_out, "held-out")
    axes.legend(frameon=False)
    return figure


def compression_figure(rows: Rows) -> Figure | None:
    """How far the cache shrinks, reached and aimed at; None where the run compresses nothing.

    Args:
        rows: Rows of ``metrics.csv``.
    """
    reached, target = Curve.of(rows, "compression"), Curve.of(rows, "compression_target")
    if not reached:
        return None
    figure, axes = _canvas("Compression of the key-value cache", "tokens per kept entry")
    axes.plot(reached.steps, reached.values, color=BLUE, linewidth=2, label="reached")
    if target:
        axes.plot(target.steps, target.values, color=GREY, linewidth=1.5, linestyle="--", label="target")
    _points(axes, Curve.of(rows, "val_compression"), "held-out")
    axes.legend(frameon=False)
    return figure


def learning_rate_figure(rows: Rows) -> Figure | None:
    """The learning rate over the run; None where it was not logged.

    Args:
        rows: Rows of ``metrics.csv``.
    """
    curve = Curve.of(rows, "learning_rate")
    if not curve:
        return None
    figure, axes = _canvas("Learning rate", "learning rate")
    axes.plot(curve.steps, curve.values, color=BLUE, linewidth=2)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    return figure


def _canvas(title: str, quantity: str) -> tuple[Figure, Axes]:
    """An empty figure over optimiser steps."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel("optimiser step", fontsize=11)
    axes.set_ylabel(quantity, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=10)
    return figure, axes


def _points(axes: Axes, curve: Curve, label: str) -> None:
    """Draw what is measured now and then as points on a thin line."""
    if curve:
        marker = "o" if len(curve.values) <= _FEW else ""
        axes.plot(curve.steps, curve.values, color=VERMILLION, linewidth=1.2, marker=marker, markersize=5, label=label)
