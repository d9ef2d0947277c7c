"""Tables on a terminal."""

import math

import pytest

from kvtrain.tables import cell


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        ("text", "text"),
        (12345, "12345"),
        (0.000123456, "0.0001235"),
        (18.7512, "18.75"),
        (999.94, "999.9"),
        (6_297_992.0, "6,297,992"),
        (-1234.4, "-1,234"),
        (math.inf, "inf"),
    ],
)
def test_a_value_is_shown_so_that_it_can_be_compared(value, shown):
    assert cell(value) == shown
