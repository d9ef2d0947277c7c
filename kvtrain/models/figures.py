"""What reports show of an architecture: figures of the tables that its training writes, and facts of its metrics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvtrain.metrics import Rows, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TableFigure:
    """A figure of one table.

    Attributes:
        name: Of its file, without ``.png``.
        table: What it shows. It is asked for in every run folder, and may be ``METRICS``.
        draw: From the table's rows, of which there is at least one, to a figure that nobody has saved yet; None where
            they hold nothing to show.
    """

    name: str
    table: Table
    draw: Callable[[Rows], "Figure | None"]


@dataclass(frozen=True)
class Fact:
    """The latest value of a metric, for the table above the figures.

    Attributes:
        label: What it is.
        column: Of ``metrics.csv``.
        form: How the number is written, as ``format`` takes it.
    """

    label: str
    column: str
    form: str


@dataclass(frozen=True)
class Figures:
    """What ``kvtrain/models/<name>/figures.py`` exports as ``FIGURES``.

    Runs are asked for every architecture's tables and metrics: a run folder holds what its own training wrote.

    Attributes:
        drawn: In the order of the page.
        facts: Below those that every run has.
    """

    drawn: tuple[TableFigure, ...] = ()
    facts: tuple[Fact, ...] = ()

    @classmethod
    def union(cls, several: Iterable["Figures"]) -> Self:
        """All of them in one; what several architectures share comes once."""
        several = tuple(several)
        drawn = tuple(dict.fromkeys(figure for one in several for figure in one.drawn))
        facts = tuple(dict.fromkeys(fact for one in several for fact in one.facts))
        assert len({figure.name for figure in drawn}) == len(drawn), "two figures would be written to one file"
        assert len({fact.label for fact in facts}) == len(facts), "two facts have one label"
        return cls(drawn, facts)
