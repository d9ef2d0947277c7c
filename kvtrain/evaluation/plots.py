"""Figures of a training run. Each function takes the run's numbers and returns a figure that nobody has saved yet."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

Rows = Sequence[dict[str, float]]
Grid = npt.NDArray[np.float64]  # (layers, heads), or any part of it

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's, distinct to the colour-blind and in print

_STEPS = "optimizer step"
_SIZE = (7.2, 4.2)  # inches
_WINDOWS = 20  # a smoothed curve averages over the twentieth part of its points
_FEW = 60  # up to so many held-out points each gets a marker
_COLORS = matplotlib.colormaps["viridis"]  # even in lightness, and distinct to the colour-blind
_MOST = 64  # tokens a slot at which pictures end
_COMPRESSIONS = (1, 2, 4, 8, 16, 32, _MOST)
_MANY = 16  # more heads than that leave no room for a number in every cell, nor for a mark at each
_DIRECTIONS = ((VERMILLION, "from above: trained by iteration"), (GREY, "from below"))
_CELL_HEIGHT, _MARGIN = 0.22, 1.3  # inches


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged.

    Attributes:
        steps: Optimizer steps, counted from 0.
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


def loss_figure(rows: Rows, distilled: bool = False) -> Figure:
    """Training loss, raw and smoothed, and the held-out loss where there is one.

    They share an axis where they measure the same, which a run that learns from a teacher does not.

    Args:
        rows: Rows of ``metrics.csv``.
        distilled: Whether the training loss is measured against a teacher; the held-out loss never is.

    Raises:
        ValueError: The run logged neither ``loss`` nor ``val_loss``.
    """
    training, held_out = Curve.of(rows, "loss"), Curve.of(rows, "val_loss")
    if not training and not held_out:
        raise ValueError("the metrics hold no loss")
    if distilled and training and held_out:
        return _loss_panels(training, held_out)
    figure, axes = _canvas("Loss", "nats per token")
    if training:
        _loss_curve(axes, training)
    _points(axes, held_out, "held-out")
    axes.legend(frameon=False)
    return figure


def _loss_panels(training: Curve, held_out: Curve) -> Figure:
    """What a student learns from above what it is judged by: two quantities that share nothing but the steps."""
    figure = Figure(figsize=(_SIZE[0], 1.4 * _SIZE[1]), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    _dress(above, "Training loss (target: the base model)", "loss per token", "")
    _loss_curve(above, training)
    above.legend(frameon=False)
    _dress(below, "Held-out loss (target: the next token)", "nats per token")
    _points(below, held_out, "held-out")
    return figure


def _loss_curve(axes: Axes, training: Curve) -> None:
    """Training loss, smoothed, above the raw one where that is another."""
    smooth = training.smoothed()
    if smooth != training:
        axes.plot(training.steps, training.values, color=BLUE, alpha=0.3, linewidth=1, label="training")
    label = "training" if smooth == training else "training, smoothed"
    axes.plot(smooth.steps, smooth.values, color=BLUE, linewidth=2, label=label)


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


def head_figure(heads: Rows) -> Figure | None:
    """How much each layer and key-value head merges, at the last validation; None where none was written.

    Args:
        heads: Rows of ``head_compression.csv``.
    """
    if not heads:
        return None
    step = max(row["step"] for row in heads)
    tokens = tokens_per_slot(_head_map([row for row in heads if row["step"] == step], "merged_fraction"))
    figure, axes, image = _grid(tokens, f"Tokens per cache slot of every head, step {step:,.0f}", LogNorm(1, _MOST))
    if tokens.shape[1] <= _MANY:
        _write_numbers(image, tokens, _as_compression)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=6 * figure.get_figheight())
    bar.set_ticks(_COMPRESSIONS, labels=[_as_compression(tokens).removesuffix(".0") for tokens in _COMPRESSIONS])
    bar.minorticks_off()
    bar.set_label("tokens per slot", fontsize=11)
    return figure


def gate_figure(gates: Rows) -> Figure | None:
    """Every head's gate at the last validation, those framed that would keep everything; None where there are none.

    Args:
        gates: Rows of ``head_gates.csv``.
    """
    if not gates:
        return None
    step = max(row["step"] for row in gates)
    last = [row for row in gates if row["step"] == step]
    values, full = _head_map(last, "gate"), _head_map(last, "full")
    title = f"Gate of every head, step {step:,.0f} (framed: keeps everything)"
    figure, axes, image = _grid(values, title, Normalize(0, 1))
    if values.shape[1] <= _MANY:
        _write_numbers(image, values, "{:.2f}".format)
    for layer, head in np.argwhere(full == 1):
        frame = Rectangle((head - 0.46, layer - 0.44), 0.92, 0.88, fill=False, edgecolor=VERMILLION, linewidth=2.5)
        axes.add_patch(frame)
    figure.colorbar(image, ax=axes, pad=0.04, aspect=6 * figure.get_figheight()).set_label("gate", fontsize=11)
    return figure


def layer_figure(heads: Rows) -> Figure | None:
    """Tokens per slot of every layer, and of all, over the validations; None where none was written.

    Args:
        heads: Rows of ``head_compression.csv``.
    """
    if not heads:
        return None
    layers = sorted({int(row["layer"]) for row in heads})
    figure, axes = _canvas("Compression of every layer", "tokens per slot")
    shades = _COLORS(np.linspace(0, 0.92, len(layers)))  # the lightest yellow is lost on white
    for layer, shade in zip(layers, shades, strict=True):
        curve = _mean_compression([row for row in heads if row["layer"] == layer])
        axes.plot(curve.steps, curve.values, color=shade, marker=_marker(curve), markersize=4, label=f"layer {layer}")
    everywhere = _mean_compression(heads)
    axes.plot(everywhere.steps, everywhere.values, "k--", linewidth=2, marker=_marker(everywhere), label="all layers")
    axes.legend(handles=[axes.lines[-1]], frameon=False)
    if len(layers) > 1:
        edges = [layer - 0.5 for layer in (*layers, layers[-1] + 1)]
        norm = BoundaryNorm(edges, len(layers))
        bar = figure.colorbar(ScalarMappable(norm, ListedColormap(shades)), ax=axes, ticks=_marks(layers))
        bar.set_label("layer", fontsize=11)
        bar.ax.minorticks_off()
    return figure


def map_figure(kv_map: Rows) -> Figure | None:
    """Whose keys and values each layer reads; None where every layer reads its own.

    Args:
        kv_map: Rows of ``kv_map.csv``, one a layer.
    """
    sources = [(int(row["layer"]), int(row["key_layer"]), int(row["value_layer"])) for row in kv_map]
    if all(layer == key == value for layer, key, value in sources):
        return None
    figure = Figure(figsize=(_SIZE[0], max(_SIZE[1], _CELL_HEIGHT * len(sources) + _MARGIN)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Whose keys and values each layer reads", loc="left", fontsize=13, fontweight="bold")
    for layer, key, value in sources:
        for source, style in {(key, "-"), (value, "-" if value == key else ":")}:
            if source != layer:
                _arc(axes, layer, source, style)
    owners = sorted({source for _, *both in sources for source in both})
    axes.plot([0] * len(sources), range(len(sources)), "o", color="white", markeredgecolor=GREY, markersize=8)
    axes.plot([0] * len(owners), owners, "s", color=BLUE, markersize=9)
    for row in kv_map:
        axes.text(0.08, row["layer"], _role(row, owners), va="center", fontsize=9)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-0.8, len(sources) - 0.2)
    axes.set_ylabel("layer", fontsize=11)
    axes.set_yticks(range(len(sources)))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    above, below = (axes.plot([], [], color=color, label=label)[0] for color, label in _DIRECTIONS)
    figure.legend(handles=[above, below], frameon=False, loc="outside lower center", ncols=2)
    return figure


def _role(row: dict[str, float], owners: Sequence[int]) -> str:
    """What a layer does, in words."""
    if row["key_layer"] != row["value_layer"]:
        role = f"reads keys of layer {row['key_layer']:.0f}, values of layer {row['value_layer']:.0f}"
    else:
        role = "owns keys and values" if row["layer"] in owners else f"reads layer {row['key_layer']:.0f}"
    return role + (", in a window" if row["sliding"] else "")


def perplexity_figure(buckets: Sequence[Bucket]) -> Figure | None:
    """Perplexity of predictions by the tokens read before them; None where it was not measured.

    Args:
        buckets: ``by_position`` of ``kvtrain eval --json``.
    """
    if not buckets:
        return None
    figure, axes = _canvas("Perplexity by position", "perplexity", "tokens read")
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
    figure, axes = _canvas("Slots kept by position", "slots, mean of a head", "tokens read")
    axes.plot([0, *positions], [0, *positions], color=GREY, linewidth=1.5, linestyle="--", label="every token kept")
    axes.plot([0, *positions], [0, *kept], color=BLUE, linewidth=2, marker="o", markersize=4, label="kept")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def tokens_per_slot(merged: Grid) -> Grid:
    """Tokens that share a slot where these fractions of them merge, 64 at most: more depends on the text's length."""
    return 1 / np.maximum(1 - merged, 1 / _MOST)


def _head_map(heads: Rows, column: str) -> Grid:
    """A column of one step as ``(layers, heads)``; NaN, which stays white, where a layer was not written."""
    shape = (int(max(row["layer"] for row in heads)) + 1, int(max(row["head"] for row in heads)) + 1)
    values = np.full(shape, np.nan)
    for row in heads:
        values[int(row["layer"]), int(row["head"])] = row[column]
    return values


def _grid(values: Grid, title: str, scale: Normalize) -> tuple[Figure, Axes, AxesImage]:
    """Numbers of ``(layers, heads)`` as colours."""
    layers, columns = values.shape
    height = max(_SIZE[1] - 1, _CELL_HEIGHT * layers + _MARGIN)
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    image = axes.imshow(values, cmap=_COLORS, norm=scale, aspect="auto", interpolation="nearest")
    axes.set_xlabel("key-value head", fontsize=11)
    axes.set_ylabel("layer", fontsize=11)
    axes.set_xticks(_marks(range(columns)))
    axes.set_yticks(_marks(range(layers)))
    axes.spines[:].set_visible(False)
    return figure, axes, image


def _arc(axes: Axes, reader: int, owner: int, style: str) -> None:
    """A curve from a layer to the one that it reads, on the left."""
    angles = np.linspace(np.pi / 2, 3 * np.pi / 2, 40)
    middle, reach = (reader + owner) / 2, abs(reader - owner) / 2
    width = 0.15 + 0.8 * (1 - math.exp(-reach / 4))
    color = _DIRECTIONS[0 if owner > reader else 1][0]
    axes.plot(width * np.cos(angles), middle + reach * np.sin(angles), style, color=color, linewidth=1.3, zorder=0)


def _marks(numbers: Sequence[int]) -> Sequence[int]:
    """As many of these numbers as an axis has room for, evenly spaced."""
    return numbers[:: -(-len(numbers) // _MANY)]


def _write_numbers(image: AxesImage, values: Grid, written: Callable[[float], str]) -> None:
    """The number that a colour stands for into every cell."""
    tones = np.asarray(image.norm(values), dtype=np.float64)
    for (layer, head), value in np.ndenumerate(values):
        if not math.isnan(value):
            color = "white" if tones[layer, head] < 0.6 else "black"
            image.axes.text(head, layer, written(value), color=color, fontsize=8, ha="center", va="center")


def _as_compression(tokens: float) -> str:
    if tokens >= _MOST:
        return f"{_MOST}+"
    return f"{tokens:.1f}" if tokens < 9.95 else f"{tokens:.0f}"


def _mean_compression(heads: Rows) -> Curve:
    """Tokens per slot at every step, from the mean of the fractions: heads have the same number of tokens."""
    steps = sorted({row["step"] for row in heads})
    means = [statistics.fmean(row["merged_fraction"] for row in heads if row["step"] == step) for step in steps]
    return Curve(steps, tokens_per_slot(np.array(means)).tolist())


def _canvas(title: str, quantity: str, over: str = _STEPS) -> tuple[Figure, Axes]:
    """A figure of one empty panel."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, title, quantity, over)
    return figure, axes


def _dress(axes: Axes, title: str, quantity: str, over: str = _STEPS) -> None:
    """Title, names and grid of an empty panel."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel(over, fontsize=11)
    axes.set_ylabel(quantity, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=10)


def _marker(curve: Curve) -> str:
    return "o" if len(curve.values) <= _FEW else ""


def _points(axes: Axes, curve: Curve, label: str) -> None:
    """Draw what is measured now and then as points on a thin line."""
    if curve:
        marker = _marker(curve)
        axes.plot(curve.steps, curve.values, color=VERMILLION, linewidth=1.2, marker=marker, markersize=5, label=label)
