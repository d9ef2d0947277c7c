"""Figures of any training run. Each function takes its numbers and returns a figure that nobody has saved yet."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvtrain.metrics import Rows
from kvtrain.plotting.canvas import BLUE, GREY, HEIGHT, WIDTH, canvas, dress
from kvtrain.plotting.curves import Curve, draw_points


@dataclass(frozen=True)
class Bucket:
    """Predictions made after nearly as many tokens.

    Attributes:
        position: Tokens read.
        loss: Mean, nats.
        kept: Slots kept of them, mean over layers and heads; None where no text is so long.
    """

    position: int
    loss: float
    kept: float | None


def loss_figure(rows: Rows, distilled: bool = False, control: Rows = ()) -> Figure:
    """Training loss, raw and smoothed, and the held-out loss where there is one, beside a control's.

    They share an axis where they measure the same, which a run that learns from a teacher does not.

    Args:
        rows: Rows of ``metrics.csv``.
        distilled: Whether the training loss is measured against a teacher; the held-out loss never is.
        control: Rows of another run, whose held-out loss is drawn, too.

    Raises:
        ValueError: The run logged neither ``loss`` nor ``val_loss``.
    """
    training, held_out, beside = Curve.of(rows, "loss"), Curve.of(rows, "val_loss"), Curve.of(control, "val_loss")
    if not training and not held_out:
        raise ValueError("the metrics hold no loss")
    if distilled and training and held_out:
        return _loss_panels(training, held_out, beside)
    figure, axes = canvas("Loss", "nats per token")
    if training:
        _loss_curve(axes, training)
    _held_out_curves(axes, held_out, beside)
    axes.legend(frameon=False)
    return figure


def speed_figure(rows: Rows) -> Figure | None:
    """Tokens a second over the run; None where they were not logged.

    Args:
        rows: Rows of ``metrics.csv``.
    """
    return _column_figure(rows, "tokens_per_second", "Speed", "tokens a second")


def _held_out_curves(axes: Axes, held_out: Curve, control: Curve) -> None:
    if control:
        axes.plot(control.steps, control.values, color=GREY, linestyle="--", marker="o", label="held-out, control")
    draw_points(axes, held_out, "held-out")


def _loss_panels(training: Curve, held_out: Curve, control: Curve) -> Figure:
    """What a student learns from above what it is judged by: two quantities that share nothing but the steps."""
    figure = Figure(figsize=(WIDTH, 1.4 * HEIGHT), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    dress(above, "Training loss (target: the base model)", "loss per token", "")
    _loss_curve(above, training)
    above.legend(frameon=False)
    dress(below, "Held-out loss (target: the next token)", "nats per token")
    _held_out_curves(below, held_out, control)
    if control:
        below.legend(frameon=False)
    return figure


def _loss_curve(axes: Axes, training: Curve) -> None:
    """Training loss, smoothed, above the raw one where that is another."""
    smooth = training.smoothed()
    if smooth != training:
        axes.plot(training.steps, training.values, color=BLUE, alpha=0.3, linewidth=1, label="training")
    label = "training" if smooth == training else "training, smoothed"
    axes.plot(smooth.steps, smooth.values, color=BLUE, linewidth=2, label=label)


def learning_rate_figure(rows: Rows) -> Figure | None:
    """The learning rate over the run; None where it was not logged.

    Args:
        rows: Rows of ``metrics.csv``.
    """
    figure = _column_figure(rows, "learning_rate", "Learning rate", "learning rate")
    if figure is not None:
        figure.axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    return figure


def _column_figure(rows: Rows, column: str, title: str, unit: str) -> Figure | None:
    """A column over the run, from 0 on; None where it was not logged."""
    curve = Curve.of(rows, column)
    if not curve:
        return None
    figure, axes = canvas(title, unit)
    axes.plot(curve.steps, curve.values, color=BLUE, linewidth=2)
    axes.set_ylim(bottom=0)
    return figure


def perplexity_figure(buckets: Sequence[Bucket]) -> Figure | None:
    """Perplexity of predictions by the tokens read before them; None where it was not measured.

    Args:
        buckets: ``by_position`` of ``kvtrain eval --json``.
    """
    if not buckets:
        return None
    figure, axes = canvas("Perplexity by position", "perplexity", "tokens read")
    with np.errstate(over="ignore"):
        values = np.exp([bucket.loss for bucket in buckets])
    axes.plot([bucket.position for bucket in buckets], values, color=BLUE, linewidth=2, marker="o", markersize=4)
    axes.set_xlim(left=0)
    return figure


def slots_figure(buckets: Sequence[Bucket]) -> Figure | None:
    """Slots kept of the tokens read, beside a cache that keeps all; None where they were not counted.

    Args:
        buckets: ``by_position`` of ``kvtrain eval --json``.
    """
    counted = [(bucket.position, bucket.kept) for bucket in buckets if bucket.kept is not None]
    if not counted:
        return None
    positions, kept = zip(*counted, strict=True)
    figure, axes = canvas("Slots kept by position", "slots, mean of a head", "tokens read")
    axes.plot([0, *positions], [0, *positions], color=GREY, linewidth=1.5, linestyle="--", label="every token kept")
    axes.plot([0, *positions], [0, *kept], color=BLUE, linewidth=2, marker="o", markersize=4, label="kept")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
