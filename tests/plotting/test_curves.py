"""A curve holds what was logged, where it was logged."""

import math

from kvtrain.plotting.curves import Curve


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
