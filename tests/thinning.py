"""Full grids, of which the gating tiers take a sample."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thinned(grid: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """All points of a grid for ``parametrize``, and ``slow`` what is not in the sample, each of whose points exists."""
    points = list(grid)
    assert all(point in points for point in sample)
    return [point if point in sample else pytest.param(*_values(point), marks=pytest.mark.slow) for point in points]


def _values(point: Any) -> tuple[Any, ...]:
    return point if isinstance(point, tuple) else (point,)
