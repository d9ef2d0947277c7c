"""Full grids, of which the gating tiers take a sample."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A point of a grid for ``parametrize`` that the gating tiers leave out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def thinned(grid: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """All points of a grid for ``parametrize``, ``slow`` where not in the sample; a tuple is several values."""
    points = list(grid)
    assert all(point in points for point in sample)
    return [point if point in sample else slow(*(point if isinstance(point, tuple) else (point,))) for point in points]
