"""What reports show of methods whose heads decide which tokens share or lose their slots: over steps, layers, heads."""

import statistics

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure

from kvtrain.metrics import METRICS, Rows
from kvtrain.models.figures import Fact, Figures, TableFigure
from kvtrain.models.gating import HEAD_COMPRESSION
from kvtrain.plotting.canvas import BLUE, COLORS, GREY, canvas, marks
from kvtrain.plotting.curves import Curve, draw_points
from kvtrain.plotting.heads import Grid, draw_map, head_map, last_validation, write_numbers

_MOST = 64  # tokens a slot at which pictures end
_COMPRESSIONS = (1, 2, 4, 8, 16, 32, _MOST)


def compression_figure(rows: Rows) -> Figure | None:
    """How far the cache shrinks, reached and aimed at; None where the run compresses nothing.

    Args:
        rows: Rows of ``metrics.csv``.
    """
    reached, target = Curve.of(rows, "compression"), Curve.of(rows, "compression_target")
    if not reached:
        return None
    figure, axes = canvas("Compression that heads decide", "tokens per slot, in the long run")
    axes.plot(reached.steps, reached.values, color=BLUE, linewidth=2, label="reached")
    if target:
        axes.plot(target.steps, target.values, color=GREY, linewidth=1.5, linestyle="--", label="target")
    draw_points(axes, Curve.of(rows, "val_compression"), "held-out")
    axes.legend(frameon=False)
    return figure


def layer_figure(heads: Rows) -> Figure:
    """Tokens per slot of every layer, and of all, over the validations.

    Args:
        heads: Rows of ``head_compression.csv``, at least one.
    """
    layers = sorted({int(row["layer"]) for row in heads})
    figure, axes = canvas("Compression of every layer", "tokens per slot")
    shades = COLORS(np.linspace(0, 0.92, len(layers)))  # the lightest yellow is lost on white
    for layer, shade in zip(layers, shades, strict=True):
        curve = _mean_compression([row for row in heads if row["layer"] == layer])
        axes.plot(curve.steps, curve.values, color=shade, marker=curve.marker, markersize=4, label=f"layer {layer}")
    everywhere = _mean_compression(heads)
    axes.plot(everywhere.steps, everywhere.values, "k--", linewidth=2, marker=everywhere.marker, label="all layers")
    axes.legend(handles=[axes.lines[-1]], frameon=False)
    if len(layers) > 1:
        edges = [layer - 0.5 for layer in (*layers, layers[-1] + 1)]
        norm = BoundaryNorm(edges, len(layers))
        bar = figure.colorbar(ScalarMappable(norm, ListedColormap(shades)), ax=axes, ticks=marks(layers))
        bar.set_label("layer", fontsize=11)
        bar.ax.minorticks_off()
    return figure


def head_figure(heads: Rows) -> Figure:
    """Tokens per slot of each layer and key-value head, at the last validation.

    Args:
        heads: Rows of ``head_compression.csv``, at least one.
    """
    step, last = last_validation(heads)
    tokens = tokens_per_slot(head_map(last, "merged_fraction"))
    figure, axes, image = draw_map(tokens, f"Tokens per cache slot of every head, step {step:,}", LogNorm(1, _MOST))
    write_numbers(image, tokens, _as_compression)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=6 * figure.get_figheight())
    bar.set_ticks(_COMPRESSIONS, labels=[_as_compression(tokens).removesuffix(".0") for tokens in _COMPRESSIONS])
    bar.minorticks_off()
    bar.set_label("tokens per slot", fontsize=11)
    return figure


def tokens_per_slot(merged: Grid) -> Grid:
    """Tokens that share a slot where these fractions of them merge, 64 at most: more depends on the text's length."""
    return 1 / np.maximum(1 - merged, 1 / _MOST)


def _as_compression(tokens: float) -> str:
    if tokens >= _MOST:
        return f"{_MOST}+"
    return f"{tokens:.1f}" if tokens < 9.95 else f"{tokens:.0f}"


def _mean_compression(heads: Rows) -> Curve:
    """Tokens per slot at every step, from the mean of the fractions: heads have the same number of tokens."""
    steps = sorted({row["step"] for row in heads})
    means = [statistics.fmean(row["merged_fraction"] for row in heads if row["step"] == step) for step in steps]
    return Curve(steps, tokens_per_slot(np.array(means)).tolist())


COMPRESSION_FIGURES = Figures(
    drawn=(
        TableFigure("compression", METRICS, compression_figure),
        TableFigure("layer_compression", HEAD_COMPRESSION, layer_figure),
        TableFigure("head_compression", HEAD_COMPRESSION, head_figure),
    ),
    facts=(
        Fact("Compression reached", "compression", ".2f"),
        Fact("Compression aimed at", "compression_target", ".2f"),
        Fact("Held-out compression at the end", "val_compression", ".2f"),
    ),
)
