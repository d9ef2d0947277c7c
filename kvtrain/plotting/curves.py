"""Metrics over the steps of a run."""

from dataclasses import dataclass

from matplotlib.axes import Axes

from kvtrain.metrics import Rows
from kvtrain.plotting.canvas import VERMILLION

_WINDOWS = 20  # a smoothed curve averages over the twentieth part of its points
_FEW = 60  # up to so many points each gets a marker


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

    @property
    def marker(self) -> str:
        """What stands at every point, as matplotlib writes it: nothing where there are many."""
        return "o" if len(self.values) <= _FEW else ""

    def smoothed(self) -> "Curve":
        """The mean of each point and those just before it."""
        window = max(1, len(self.values) // _WINDOWS)
        tails = (self.values[max(0, end - window) : end] for end in range(1, len(self.values) + 1))
        return Curve(self.steps, [sum(tail) / len(tail) for tail in tails])


def draw_points(axes: Axes, curve: Curve, label: str) -> None:
    """Draw what is measured now and then as points on a thin line; nothing where it never was."""
    if curve:
        marker = curve.marker
        axes.plot(curve.steps, curve.values, color=VERMILLION, linewidth=1.2, marker=marker, markersize=5, label=label)
