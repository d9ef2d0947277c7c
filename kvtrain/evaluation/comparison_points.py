"""What ``kvtrain eval --json`` says of methods on tasks that are decoded, as points of quality and bytes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from kvtrain.errors import UsageError
from kvtrain.models.parse_method import parse_method

_SAME = ("corpus", "length", "windows", "tokens", "answers")  # what rows of one task must have in common


@dataclass(frozen=True)
class Panel:
    """How the quality of a task is shown, or of one kind of it.

    Attributes:
        key: Of a task's figures, the one that is shown.
        title: What it is.
        better: Which way.
    """

    key: str
    title: str
    better: Literal["lower", "higher"]


PANELS = {
    "continuation": Panel("perplexity", "perplexity of continuations", "lower"),
    "passkey": Panel("accuracy", "share of passkeys found", "higher"),
    "retrieval": Panel("accuracy", "share of values found", "higher"),
}


@dataclass(frozen=True)
class Point:
    """One method on one task.

    Attributes:
        panel: Where it belongs.
        label: Of its line: the method without its sizes, or the name that its file was given.
        method: With its settings.
        trained: Whether weights were trained with the method in them.
        plain: Whether nothing shrinks.
        quality: What the task measures.
        mean: Bytes of a row in the cache while it answers, mean over steps.
        end: After the last step.
        peak: The most after any pass, those over the prompt included.
        share: ``mean`` as a share of what a plain cache would hold; None of a model that has no host.
        measured_on: What figures must have in common to stand side by side.
    """

    panel: Panel
    label: str
    method: str
    trained: bool
    plain: bool
    quality: float
    mean: float
    end: float
    peak: float
    share: float | None
    measured_on: dict[str, Any]


def read_points(file: str) -> list[Point]:
    """What one file holds of tasks that are decoded.

    Args:
        file: ``FILE`` or ``NAME=FILE``.

    Raises:
        ValueError: It is missing, or not what ``kvtrain eval --json`` writes.
    """
    name, path = _named(file)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; kvtrain eval MODEL --tasks ... --json FILE writes one")
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [_point(row, name) for row in rows if row["task"] in PANELS and row.get("kv_bytes_mean") is not None]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what this version of kvtrain eval --json writes ({error})") from error


def _named(file: str) -> tuple[str | None, Path]:
    """The name that a file is given, and the file."""
    name, equals, path = file.partition("=")
    return (name, Path(path)) if equals and not Path(file).exists() else (None, Path(file))


def panels_of(points: Sequence[Point]) -> dict[Panel, list[Point]]:
    """Points by their panels, which are in the order of ``PANELS``."""
    there = dict.fromkeys(point.panel for point in points)
    ordered = [panel for known in PANELS.values() for panel in there if panel.title.startswith(known.title)]
    return {panel: [point for point in points if point.panel == panel] for panel in ordered}


def _point(row: dict[str, Any], name: str | None) -> Point:
    text, panel = str(row["method"]), PANELS[row["task"]]
    if "kind" in row:
        panel = replace(panel, title=f"{panel.title}, {row['kind']}")
    return Point(
        panel=panel,
        label=name or label(text),
        method=text,
        trained=bool(row["trained"]),
        plain=text == "Full()",
        quality=float(row[panel.key]),
        mean=float(row["kv_bytes_mean"]),
        end=float(row["kv_bytes_end"]),
        peak=float(row["kv_bytes_peak"]),
        share=None if row["kv_share_mean"] is None else float(row["kv_share_mean"]),
        measured_on={key: row[key] for key in _SAME if key in row},
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
    kinds = [
        f"{field.name}={getattr(method, field.name)}"
        for field in fields(method)
        if isinstance(getattr(method, field.name), str | bool) and getattr(method, field.name) != field.default
    ]
    name = "plain, fewer bits" if method.trains_as_host else type(method).__name__
    return ", ".join([name, *kinds])


def require_one_measure(points: Sequence[Point]) -> None:
    """Refuse points of one panel that were measured on different texts, lengths or numbers of samples.

    Raises:
        ValueError: There are such.
    """
    for panel, (first, *others) in panels_of(points).items():
        for point in others:
            apart = [key for key in _SAME if point.measured_on.get(key) != first.measured_on.get(key)]
            if apart:
                values = " and ".join(str(one.measured_on.get(apart[0])) for one in (first, point))
                raise UsageError(
                    f"{panel.title}: {first.method} and {point.method} were measured on different {apart[0]} "
                    f"({values}); give kvtrain eval the same options for all"
                )
