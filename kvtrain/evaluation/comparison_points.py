"""What ``kvtrain eval --json`` says of methods on tasks that are decoded, as points of quality and bytes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from kvtrain.errors import UsageError
from kvtrain.models.parse_method import parse_method

MIB = 2**20
PLAIN = "plain model"
_NO_BYTES = (
    "{path}: nothing in it says what a cache holds while it answers; measure with kvtrain eval --tasks continuation, "
    "--tasks ruler:LENGTH, reasoning:NAME or lm-eval:NAME, or --tasks passkey,retrieval --ask after"
)


@dataclass(frozen=True)
class Panel:
    """How the quality of a task is shown, or of one kind of it.

    Attributes:
        key: Of a task's figures, the one that is shown.
        title: What it is.
        better: Which way.
        kind: Where the task has several.
    """

    key: str
    title: str
    better: Literal["lower", "higher"]
    kind: str | None = None

    @property
    def heading(self) -> str:
        """Above it."""
        return self.title if self.kind is None else f"{self.title}: {self.kind}"


PANELS = {
    "continuation": Panel("perplexity", "Perplexity of continuations", "lower"),
    "passkey": Panel("accuracy", "Share of passkeys found", "higher"),
    "retrieval": Panel("accuracy", "Share of values found", "higher"),
    "ruler": Panel("recall", "Share of what RULER asks for", "higher"),
    "reasoning": Panel("score", "reasoning-gym", "higher"),
    "lm-eval": Panel("acc", "lm-eval", "higher"),  # the metric is the task's own
}


@dataclass(frozen=True)
class Point:
    """One method on one task.

    Attributes:
        panel: Where it belongs.
        label: Of its line: the method without its sizes, or the name that its file was given.
        model: As it was opened.
        method: With its settings.
        trained: Whether weights were trained with the method in them.
        plain: Whether nothing shrinks.
        quality: What the task measures.
        mean: Bytes of a row in the cache while it answers, mean over steps.
        end: After the last step.
        peak: The most after any pass, those over the prompt included.
        share: ``mean`` as a share of what a plain cache would hold; None of a model that has no host.
        answers: That were asked for.
        measured_on: What figures must have in common to stand side by side.
    """

    panel: Panel
    label: str
    model: str
    method: str
    trained: bool
    plain: bool
    quality: float
    mean: float
    end: float
    peak: float
    share: float | None
    answers: int
    measured_on: dict[str, Any]


def read_points(file: str) -> list[Point]:
    """What one file holds of tasks that are decoded.

    Args:
        file: ``FILE`` or ``NAME=FILE``.

    Raises:
        ValueError: It is missing, not what ``kvtrain eval --json`` writes, or holds no such task.
    """
    name, path = _named(file)
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        points = [_point(row, name) for row in rows if _is_drawn(row)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what this version of kvtrain eval --json writes ({error})") from error
    if not points:
        raise UsageError(_NO_BYTES.format(path=path))
    return points


def _named(file: str) -> tuple[str | None, Path]:
    """The name that a file is given, and the file; either may hold equals signs.

    Raises:
        ValueError: There is no such file, or an empty name.
    """
    if Path(file).is_file():
        return None, Path(file)
    places = [place for place, letter in enumerate(file) if letter == "="]
    for place in places:
        if place and Path(file[place + 1 :]).is_file():
            return file[:place], Path(file[place + 1 :])
    raise UsageError(
        f"{file}: there is no such file, nor one behind a name and an equals sign; kvtrain eval MODEL --tasks ... "
        "--json FILE writes one"
    )


def panels_of(points: Sequence[Point]) -> dict[Panel, list[Point]]:
    """Points by their panels, which are in the order of ``PANELS``."""
    there = dict.fromkeys(point.panel for point in points)
    ordered = [panel for known in PANELS.values() for panel in there if panel.title.startswith(known.title)]
    return {panel: [point for point in points if point.panel == panel] for panel in ordered}


def _family(row: dict[str, Any]) -> str:
    """The task of a row without its argument: ``ruler`` of ``ruler:4096:vt``."""
    return str(row["task"]).partition(":")[0]


def _is_drawn(row: dict[str, Any]) -> bool:
    """Whether a row has a panel and bytes; lm-eval's sums over tasks have none, and its early rows no metric."""
    metric = row.get("metric") is not None or _family(row) != "lm-eval"
    return _family(row) in PANELS and metric and row.get("kv_bytes_mean") is not None


def _panel(row: dict[str, Any]) -> Panel:
    """Where a row belongs; what RULER asks for is of one length each, and others' tasks stand by themselves."""
    family, _, task = str(row["task"]).partition(":")
    panel = replace(PANELS[family], kind=row.get("kind"))
    if family == "reasoning":
        panel = replace(panel, title=f"{panel.title}, {task}: score")
    if family == "lm-eval":
        key, better = str(row["metric"]), row["better"]
        panel = replace(panel, key=key, title=f"{panel.title}, {task}: {key}", better=better)
    if family == "ruler":
        panel = replace(panel, title=f"{panel.title} in {row['measured_on']['sequence_length']:,} tokens")
    return panel


def pooled(points: Sequence[Point]) -> list[Point]:
    """All kinds of a task as one: what is found of all answers, and bytes in the mean over kinds.

    Args:
        points: From ``read_points``; those of tasks without kinds, and kinds that stand alone, stay as they are.
    """
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        key = (replace(point.panel, kind=None), point.label, point.model, point.method, point.trained)
        groups.setdefault(key, []).append(point)
    several = {key[0] for key, group in groups.items() if len({point.panel.kind for point in group}) > 1}
    return [one for key, group in groups.items() for one in ([_pool(key[0], group)] if key[0] in several else group)]


def _pool(panel: Panel, points: Sequence[Point]) -> Point:
    def average(name: str) -> float:
        return float(mean(getattr(point, name) for point in points))

    answers = sum(point.answers for point in points)
    kinds = sorted({str(point.panel.kind) for point in points})
    return replace(
        points[0],
        panel=panel,
        quality=sum(point.quality * point.answers for point in points) / answers,
        mean=average("mean"),
        end=average("end"),
        peak=average("peak"),
        share=None if points[0].share is None else average("share"),
        answers=answers,
        measured_on={**points[0].measured_on, "kinds": ", ".join(kinds)},
    )


def _point(row: dict[str, Any], name: str | None) -> Point:
    text, panel = str(row["method"]), _panel(row)
    plain = text == "Full()"
    return Point(
        panel=panel,
        label=name or (PLAIN if plain else label(text)),
        model=str(row["model"]),
        method=text,
        trained=bool(row["trained"]),
        plain=plain,
        quality=float(row[panel.key]),
        mean=float(row["kv_bytes_mean"]),
        end=float(row["kv_bytes_end"]),
        peak=float(row["kv_bytes_peak"]),
        share=None if row["kv_share_mean"] is None else float(row["kv_share_mean"]),
        answers=int(row.get("answers", 1)),
        measured_on=dict(row["measured_on"]),
    )


def label(text: str) -> str:
    """A method without its sizes: what points of one line have in common.

    Args:
        text: As ``--method`` takes it; anything else is its own label.
    """
    try:
        method = parse_method(text)
    except ValueError:
        return text.removesuffix("()")
    if method.trains_as_host:
        return "plain, fewer bits"
    kinds = []
    for field in fields(method):
        value = getattr(method, field.name)
        names_a_kind = isinstance(value, str | bool) or field.name.endswith("bits")
        if names_a_kind and value != field.default:
            kinds.append(f"{field.name}={value}")
    return ", ".join([type(method).__name__, *kinds])


def require_one_measure(points: Sequence[Point]) -> None:
    """Refuse points of one panel that were measured on different texts, lengths or numbers of samples.

    Raises:
        ValueError: There are such.
    """
    for panel, (first, *others) in panels_of(points).items():
        for point in others:
            ours, theirs = first.measured_on, point.measured_on
            apart = next((key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)), None)
            if apart is not None:
                raise UsageError(
                    f"{panel.heading}: {first.method} and {point.method} were measured on different things ({apart}: "
                    f"{ours.get(apart)} and {theirs.get(apart)}); give kvtrain eval the same options for all"
                )
