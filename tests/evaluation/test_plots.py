"""The figures of a run show the numbers of its metrics."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from kvtrain.evaluation.plots import (
    BLUE,
    GREY,
    VERMILLION,
    Bucket,
    Curve,
    compression_figure,
    head_figure,
    layer_figure,
    learning_rate_figure,
    loss_figure,
    map_figure,
    perplexity_figure,
    slots_figure,
    tokens_per_slot,
)


def line(figure: Figure, label: str) -> tuple[list[float], list[float]]:
    """Coordinates of the line with this label."""
    (found,) = [drawn for drawn in figure.axes[0].lines if drawn.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_curve_skips_rows_without_the_column():
    rows = [{"step": 0, "loss": 3.0}, {"step": 1}, {"step": 5, "loss": 2.0}]
    assert Curve.of(rows, "loss") == Curve([0, 5], [3.0, 2.0])
    assert not Curve.of(rows, "val_loss")


def test_a_short_curve_is_not_smoothed():
    curve = Curve([0, 1, 2], [3.0, 1.0, 2.0])
    assert curve.smoothed() == curve


def test_smoothing_averages_a_point_with_those_before_it():
    values = [float(n) for n in range(60)]  # a window of three
    smooth = Curve(list(range(60)), values).smoothed()
    assert smooth.values[:3] == [0.0, 0.5, 1.0]
    assert smooth.values[2:] == [value - 1 for value in values[2:]]
    assert smooth.steps == list(range(60))


def test_a_value_that_is_no_number_spoils_its_window_alone():
    values = [1.0] * 60
    values[30] = math.nan
    spoilt = [
        index for index, value in enumerate(Curve(list(range(60)), values).smoothed().values) if math.isnan(value)
    ]
    assert spoilt == [30, 31, 32]


def test_the_loss_figure_draws_training_and_held_out_losses():
    rows = [{"step": n, "loss": 4.0 - n} for n in range(3)] + [{"step": 3, "val_loss": 1.5}]
    figure = loss_figure(rows)
    assert line(figure, "training") == ([0, 1, 2], [4.0, 3.0, 2.0])
    assert line(figure, "held-out") == ([3], [1.5])
    assert labels(figure) == ["training", "held-out"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("optimizer step", "nats per token")


def test_the_smoothed_loss_is_drawn_too():
    figure = loss_figure([{"step": n, "loss": float(n)} for n in range(40)])  # a window of two
    assert line(figure, "training, smoothed")[1][-1] == 38.5
    assert labels(figure) == ["training", "training, smoothed"]


def test_a_run_that_was_only_validated_has_a_loss_figure():
    for distilled in (False, True):
        assert labels(loss_figure([{"step": 0, "val_loss": 2.0}], distilled)) == ["held-out"]


def test_a_divergence_and_a_cross_entropy_have_a_panel_each():
    rows = [{"step": n, "loss": 0.08 / (n + 1)} for n in range(3)] + [{"step": 2, "val_loss": 3.05}]
    above, below = loss_figure(rows, distilled=True).axes
    assert [line.get_label() for line in above.lines] == ["training"]
    assert list(above.lines[0].get_ydata()) == [0.08, 0.04, 0.08 / 3]
    assert [list(line.get_ydata()) for line in below.lines] == [[3.05]]
    assert above.get_ylim()[1] < 0.1 and below.get_ylim()[0] > 2
    assert above.get_xlim() == below.get_xlim()
    assert [axes.get_title(loc="left") for axes in (above, below)] == [
        "Training loss (target: the base model)",
        "Held-out loss (target: the next token)",
    ]


def test_a_run_without_losses_is_refused():
    with pytest.raises(ValueError, match="hold no loss"):
        loss_figure([{"step": 0, "learning_rate": 1.0}])


def test_the_compression_figure_draws_reached_target_and_held_out():
    rows = [
        {"step": 9, "compression": 1.1, "compression_target": 1.2},
        {"step": 19, "compression": 1.9, "compression_target": 2.0, "val_compression": 1.8},
    ]
    figure = compression_figure(rows)
    assert figure is not None
    assert line(figure, "reached") == ([9, 19], [1.1, 1.9])
    assert line(figure, "target") == ([9, 19], [1.2, 2.0])
    assert line(figure, "held-out") == ([19], [1.8])


def test_a_run_that_compresses_nothing_has_no_compression_figure():
    assert compression_figure([{"step": 0, "loss": 1.0, "compression_target": 4.0}]) is None


def test_compression_without_a_target():
    figure = compression_figure([{"step": 0, "compression": 2.0}])
    assert figure is not None
    assert labels(figure) == ["reached"]


def test_the_learning_rate_figure_starts_at_zero():
    figure = learning_rate_figure([{"step": 9, "learning_rate": 1e-3}, {"step": 19, "learning_rate": 5e-4}])
    assert figure is not None
    (drawn,) = figure.axes[0].lines
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([9, 19], [1e-3, 5e-4])
    assert figure.axes[0].get_ylim()[0] == 0
    assert learning_rate_figure([{"step": 0, "loss": 1.0}]) is None


def head_rows(step, fractions):
    """Rows of ``head_compression.csv`` from a nested list, layer by layer."""
    return [
        {"step": step, "layer": layer, "head": head, "merged_fraction": fraction}
        for layer, heads in enumerate(fractions)
        for head, fraction in enumerate(heads)
    ]


def test_the_map_of_heads_draws_the_last_validation():
    fractions = [[0.0, 0.5, 0.75], [0.9, 1.0, 0.96]]
    figure = head_figure(head_rows(79, fractions) + head_rows(39, [[0.1, 0.1, 0.1]] * 2))
    assert figure is not None
    axes, scale = figure.axes[:2]
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[1, 2, 4], [10, 64, 25]])
    assert image.get_clim() == (1, 64)
    written = {(text.get_position()): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "1.0", (1, 0): "2.0", (2, 0): "4.0", (0, 1): "10", (1, 1): "64+", (2, 1): "25"}
    assert axes.get_title("left") == "Tokens per cache slot of every head, step 79"
    marks = dict(zip(scale.get_yticks(), [text.get_text() for text in scale.get_yticklabels()], strict=True))
    assert (marks[1], marks[2], marks[32], marks[64]) == ("1", "2", "32", "64+")


def test_a_head_that_merges_a_whole_text_is_no_number_of_its_length():
    figure = head_figure(head_rows(0, [[1 - 1 / 24543, 1.0, 1 - 1 / 9.97, 1 - 1 / 63.9]]))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["64+", "64+", "10", "64"]
    assert line(layer_figure(head_rows(0, [[1.0, 1.0]])), "layer 0") == ([0], [64])


def test_a_layer_that_decides_nothing_stays_empty():
    figure = head_figure([{"step": 1, "layer": 2, "head": 0, "merged_fraction": 0.5}])
    assert figure is not None
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array()).tolist() == [[True], [True], [False]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["2.0"]


@pytest.mark.parametrize(("layers", "heads", "marks"), [(6, 8, 8), (8, 32, 16), (40, 40, 14)])
def test_large_maps_are_marked_sparsely(layers, heads, marks):
    figure = head_figure(head_rows(0, np.full((layers, heads), 0.5).tolist()))
    assert figure is not None
    assert len(figure.axes[0].get_xticks()) == marks
    assert len(figure.axes[0].texts) == (layers * heads if heads <= 16 else 0)


def test_every_layer_has_a_curve_of_the_mean_over_its_heads():
    rows = head_rows(39, [[0.0, 0.5], [0.5, 0.5]]) + head_rows(79, [[0.25, 0.75], [0.6, 0.9]])
    figure = layer_figure(rows)
    assert figure is not None
    assert line(figure, "layer 0") == ([39, 79], pytest.approx([1 / 0.75, 2.0]))
    assert line(figure, "layer 1") == ([39, 79], pytest.approx([2.0, 4.0]))
    assert line(figure, "all layers") == ([39, 79], pytest.approx([1 / 0.625, 1 / 0.375]))
    shades = [drawn.get_color() for drawn in figure.axes[0].lines]
    assert not np.allclose(shades[0], shades[1])
    assert [int(mark) for mark in figure.axes[1].get_yticks()] == [0, 1]


def test_a_run_without_heads_has_no_figures_of_them():
    assert head_figure([]) is None
    assert layer_figure([]) is None


def test_tokens_per_slot():
    assert tokens_per_slot(np.array([0.0, 0.75, 63 / 64, 1 - 1 / 24543, 1.0])).tolist() == [1.0, 4.0, 64.0, 64.0, 64.0]


def map_rows(keys, values=None, sliding=()):
    """Rows of ``kv_map.csv``."""
    return [
        {"layer": layer, "key_layer": key, "value_layer": value, "sliding": int(layer in sliding)}
        for layer, (key, value) in enumerate(zip(keys, values or keys, strict=True))
    ]


def marked(figure: Figure, marker: str) -> tuple[list[float], str]:
    """Layers with this marker, all above each other, and its colour."""
    (found,) = [drawn for drawn in figure.axes[0].lines if drawn.get_marker() == marker]
    assert set(found.get_xdata()) == {0}
    return list(found.get_ydata()), found.get_color()


def arcs(figure: Figure) -> list[tuple[int, int, str, str]]:
    """Lower layer, upper layer, colour and style of every curve, all on the left."""
    curves = [drawn for drawn in figure.axes[0].lines if len(drawn.get_xdata()) > 2 and drawn.get_marker() == "None"]
    left, _right = figure.axes[0].get_xlim()
    assert all(left < min(curve.get_xdata()) and max(curve.get_xdata()) < 1e-9 for curve in curves)
    ends = [sorted(round(float(curve.get_ydata()[end]), 6) for end in (0, -1)) for curve in curves]
    return sorted((*pair, curve.get_color(), curve.get_linestyle()) for pair, curve in zip(ends, curves, strict=True))


def roles(figure: Figure) -> list[str]:
    """What stands beside each layer, from below."""
    texts = {text.get_position()[1]: text.get_text() for text in figure.axes[0].texts}
    return [texts[layer] for layer in range(len(texts))]


def test_a_map_marks_owners_and_draws_an_arc_for_every_reader():
    figure = map_figure(map_rows([0, 3, 3, 3, 3, 5]))
    assert figure is not None
    assert marked(figure, "s") == ([0, 3, 5], BLUE)
    assert marked(figure, "o")[0] == list(range(6))
    assert arcs(figure) == [(1, 3, VERMILLION, "-"), (2, 3, VERMILLION, "-"), (3, 4, GREY, "-")]
    owns, reads = "owns keys and values", "reads layer 3"
    assert roles(figure) == [owns, reads, reads, owns, reads, owns]
    (legend,) = figure.legends
    shown = zip(legend.get_texts(), legend.get_lines(), strict=True)
    directions = {"from above: trained by iteration": VERMILLION, "from below": GREY}
    assert {text.get_text(): handle.get_color() for text, handle in shown} == directions
    assert list(figure.axes[0].get_yticks()) == list(range(6))


def test_a_map_whose_values_go_their_own_way_has_dotted_arcs_for_them():
    figure = map_figure(map_rows([0, 1, 1, 1], values=[0, 1, 0, 1], sliding=(1, 3)))
    assert figure is not None
    assert marked(figure, "s") == ([0, 1], BLUE)
    assert arcs(figure) == [(0, 2, GREY, ":"), (1, 2, GREY, "-"), (1, 3, GREY, "-")]
    assert roles(figure) == [
        "owns keys and values",
        "owns keys and values, in a window",
        "reads keys of layer 1, values of layer 0",
        "reads layer 1, in a window",
    ]


def test_a_map_in_which_nothing_is_shared_is_not_drawn():
    assert map_figure(map_rows([0, 1, 2])) is None
    assert map_figure([]) is None


def test_perplexity_is_drawn_at_the_tokens_read():
    figure = perplexity_figure([Bucket(64, math.log(8.0), 30.0), Bucket(128, math.log(5.0), None)])
    assert figure is not None
    (drawn,) = figure.axes[0].lines
    assert list(drawn.get_xdata()) == [64, 128]
    assert list(drawn.get_ydata()) == pytest.approx([8.0, 5.0])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("tokens read", "perplexity")
    assert perplexity_figure([Bucket(64, 1e4, None)]) is not None  # a model that has diverged
    assert perplexity_figure([]) is None


def test_slots_are_drawn_beside_those_of_a_full_cache():
    figure = slots_figure([Bucket(64, 2.0, 30.0), Bucket(128, 2.0, 55.5), Bucket(192, 2.0, None)])
    assert figure is not None
    assert line(figure, "kept") == ([0, 64, 128], [0, 30.0, 55.5])
    assert line(figure, "every token kept") == ([0, 64, 128], [0, 64, 128])
    assert slots_figure([Bucket(64, 2.0, None)]) is None
