"""The figures of heads that decide show what was measured of them."""

import numpy as np
import pytest

from kvtrain.models.compression_figures import compression_figure, head_figure, layer_figure, tokens_per_slot
from tests.plotting.drawn import labels, line


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
    assert [text.get_text() for text in figure.axes[0].texts] == ["64+", "64+", "10", "64"]
    assert line(layer_figure(head_rows(0, [[1.0, 1.0]])), "layer 0") == ([0], [64])


def test_a_layer_that_decides_nothing_stays_empty():
    figure = head_figure([{"step": 1, "layer": 2, "head": 0, "merged_fraction": 0.5}])
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array()).tolist() == [[True], [True], [False]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["2.0"]


@pytest.mark.parametrize(("layers", "heads", "marks"), [(6, 8, 8), (8, 32, 16), (40, 40, 14)])
def test_large_maps_are_marked_sparsely(layers, heads, marks):
    figure = head_figure(head_rows(0, np.full((layers, heads), 0.5).tolist()))
    assert len(figure.axes[0].get_xticks()) == marks
    assert len(figure.axes[0].texts) == (layers * heads if heads <= 16 else 0)


def test_every_layer_has_a_curve_of_the_mean_over_its_heads():
    rows = head_rows(39, [[0.0, 0.5], [0.5, 0.5]]) + head_rows(79, [[0.25, 0.75], [0.6, 0.9]])
    figure = layer_figure(rows)
    assert line(figure, "layer 0") == ([39, 79], pytest.approx([1 / 0.75, 2.0]))
    assert line(figure, "layer 1") == ([39, 79], pytest.approx([2.0, 4.0]))
    assert line(figure, "all layers") == ([39, 79], pytest.approx([1 / 0.625, 1 / 0.375]))
    shades = [drawn.get_color() for drawn in figure.axes[0].lines]
    assert not np.allclose(shades[0], shades[1])
    assert [int(mark) for mark in figure.axes[1].get_yticks()] == [0, 1]


def test_tokens_per_slot():
    assert tokens_per_slot(np.array([0.0, 0.75, 63 / 64, 1 - 1 / 24543, 1.0])).tolist() == [1.0, 4.0, 64.0, 64.0, 64.0]
