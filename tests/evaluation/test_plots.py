"""The figures of a run show the numbers of its metrics."""

import math

import pytest

from kvtrain.evaluation.plots import Bucket, learning_rate_figure, loss_figure, perplexity_figure, slots_figure
from tests.plotting.drawn import labels, line


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


def test_the_learning_rate_figure_starts_at_zero():
    figure = learning_rate_figure([{"step": 9, "learning_rate": 1e-3}, {"step": 19, "learning_rate": 5e-4}])
    assert figure is not None
    (drawn,) = figure.axes[0].lines
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([9, 19], [1e-3, 5e-4])
    assert figure.axes[0].get_ylim()[0] == 0
    assert learning_rate_figure([{"step": 0, "loss": 1.0}]) is None


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
