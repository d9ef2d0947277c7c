"""Cells of comparisons at equal bytes: what ``kvtrain eval`` says of arms, in files that ``report --compare`` draws."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from arms import FIXED, HEADS, SIZED, fit, streaming
from torch import Tensor, bfloat16
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from kvtrain.durable import write_text
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.kernels.dispatch import cpu_has_bfloat16
from kvtrain.models.method import Method

AS_IT_IS = 0  # the ratio of arms without a size
UNTRAINED = (*FIXED, *SIZED, *HEADS)

_FEW_ROWS = 16

Figures = dict[str, Any]


class Cell(NamedTuple):
    """One measurement: which arm, at which part of the bytes, trained from which seed (0: not trained)."""

    arm: str
    ratio: int
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        name: Of ``kvtrain eval``.
        limit: Windows or samples, of every kind where there are several.
        trial: As many to try a size on: what some policies keep depends on the text. Where it is ``limit``, the last
            try is the measurement.
        settings: See ``kvtrain.evaluation.evaluate.Settings``.
        answering: Tokens of a row while it answers, in the mean, as a share of its length: sizes are tried from there.
    """

    name: str
    limit: int
    trial: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    answering: float = 1.0


@dataclass(frozen=True)
class Bench:
    """A base, what is measured on it, and where results go.

    Attributes:
        base: Folder or name.
        folder: Of the results, a file an arm.
        tasks: All of one length.
        length: Tokens of a window or sample.
        dtype: Of weights and caches.
    """

    base: str
    folder: Path
    tasks: tuple[Task, ...]
    length: int = 1024
    dtype: str = "bfloat16"

    def measure(self, task: Task, model: str, method: Method | None = None, limit: int | None = None) -> list[Figures]:
        """Rows of ``kvtrain eval`` on a task."""
        settings = {**task.settings, "sequence_length": self.length, "limit": limit or task.limit}
        with nullcontext() if cpu_has_bfloat16() else WideProducts():
            return run_tasks(model, [task.name], dtype=self.dtype, method=method, **settings)

    def untrained(self, cell: Cell, worth: Tensor | None = None) -> list[Figures]:
        """Rows of an arm that needs no training, at its own size for each task; without a method where none fits.

        Args:
            cell: Which; of an arm that is not among ``UNTRAINED``, heads are chosen as of ``HEADS``.
            worth: What every key-value head is worth, where heads are chosen.
        """
        rows = []
        for task in self.tasks:
            measure = functools.cache(functools.partial(self.measure, task, self.base))
            method = self._method(cell, task, worth, measure)
            rows += [{"task": task.name, "method": None}] if method is None else measure(method, task.limit)
        return rows

    def _method(
        self, cell: Cell, task: Task, worth: Tensor | None, measure: Callable[[Method, int], list[Figures]]
    ) -> Method | None:
        if cell.arm in FIXED:
            return FIXED[cell.arm]
        share = 1 / cell.ratio
        sized = SIZED[cell.arm] if worth is None else streaming(worth, share, self.length)

        def share_of(method: Method) -> float:
            return mean(row["kv_share_mean"] for row in measure(method, task.trial))

        return fit(sized, share_of, share, self.length, task.answering)

    def rows(self) -> list[Figures]:
        """All that there is, with what ``Cell`` names in every row."""
        return [row for path in sorted(self.folder.glob("*.json")) for row in json.loads(path.read_text())]

    def done(self) -> set[Cell]:
        """Cells that there are."""
        return {cell_of(row) for row in self.rows()}

    def keep(self, cell: Cell, rows: Iterable[Figures], training_tokens: int = 0) -> None:
        """Put a cell's rows into the file of its arm.

        Args:
            cell: Which.
            rows: From ``kvtrain eval``.
            training_tokens: That its model was trained on.
        """
        path = self.file(cell.arm)
        before = json.loads(path.read_text()) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        own = [{**row, **cell._asdict(), "training_tokens": training_tokens} for row in rows]
        write_text(path, json.dumps([*before, *own], indent=1) + "\n")

    def charted(self, arms: Iterable[str]) -> list[str]:
        """Files of arms for ``report --compare``, each under its name, where they hold anything."""
        measured = {row["arm"] for row in self.rows() if row.get("method")}
        return [f"{'plain model' if arm == 'Full' else arm}={self.file(arm)}" for arm in arms if arm in measured]

    def file(self, arm: str) -> Path:
        """Where an arm's rows lie."""
        return self.folder / f"{slug(arm)}.json"


class WideProducts(TorchFunctionMode):
    """Layers of bfloat16 sum in float32 and round once, as instructions for it do, where a CPU has none of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch; a few rows are as fast without."""
        kwargs = kwargs or {}
        if func is not linear or not args or args[0].dtype != bfloat16 or args[0].shape[:-1].numel() <= _FEW_ROWS:
            return func(*args, **kwargs)
        wide = {name: _float(value) for name, value in kwargs.items()}
        return linear(*map(_float, args), **wide).to(bfloat16)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def cell_of(row: Figures) -> Cell:
    """The cell that a row belongs to."""
    return Cell(*(row[name] for name in Cell._fields))


def slug(name: str) -> str:
    """A name as part of a path."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).replace("--", "-").strip("-")


def untrained_cells(ratios: Iterable[int]) -> list[Cell]:
    """Arms that need no training, at every ratio; those without a size once."""
    ratios = list(ratios)
    return [Cell(arm, ratio) for arm in UNTRAINED for ratio in ((AS_IT_IS,) if arm in FIXED else ratios)]


def arms_of(names: Iterable[str], groups: Mapping[str, Iterable[str]]) -> set[str]:
    """Arms by name, or by group.

    Args:
        names: Of either.
        groups: Arms by the name of their group.

    Raises:
        SystemExit: There is none of a name.
    """
    known = {name: set(arms) for name, arms in groups.items()}
    known |= {arm: {arm} for arms in groups.values() for arm in arms}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no arm {unknown[0]!r}; there are {', '.join(known)}")
    return set().union(*(known[name] for name in names))
