"""YAML that somebody hands us, looked over before it is loaded: a tree of bounded size that says everything once.

YAML allows what no recipe needs and what no reader of plain values survives: a collection that holds itself, ten
lines that stand for a billion values, a key that is given twice and silently counts once, numbers that are none.
"""

import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000
_DEEPEST = 64
_MERGE = "<<"
_NO_NUMBERS = (".nan", ".inf")
_NUMERIC = frozenset("+-.0123456789")  # what numbers begin with
# Plain words and numbers, which need no walk: nothing in them opens, names or separates.
_WORDS = re.compile(r"[\w./+][\w ./+-]*", re.ASCII)


class StrictYAMLError(yaml.MarkedYAMLError):
    """Well-formed YAML that is refused; ``problem`` says why, ``problem_mark`` where it is a place."""


@dataclass
class _Collection:
    """A mapping or sequence whose end has not been read yet."""

    anchor: str | None
    is_mapping: bool
    values: int = 1
    children: int = 0
    lines: dict[str, int] = field(default_factory=dict)  # where each key was given


@functools.lru_cache(maxsize=1024)  # parsers ask for the same words and the same file again and again
def check(text: str) -> None:
    """Refuse what is not worth loading, in one pass that builds nothing.

    Raises:
        yaml.YAMLError: It is no YAML; or, as a ``StrictYAMLError``, it is too long or too deep, stands for too many
            values, holds itself, gives a key twice, or has a number that is infinite or none.
    """
    if len(text) > MOST_CHARACTERS:
        raise _refusal(f"longer than {MOST_CHARACTERS:,} characters")
    if _WORDS.fullmatch(text) and not _is_no_number(text):
        return
    walk = _Walk()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            walk.see(event)
    except UnicodeEncodeError as error:
        raise _refusal("holds half a surrogate pair, not text") from error


def load(text: str) -> Any:
    """Plain values.

    Raises:
        yaml.YAMLError: See ``check``.
    """
    check(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except ValueError as error:  # such as a date in the thirteenth month
        raise _refusal(str(error)) from error


def compose(text: str) -> yaml.Node | None:
    """The tree of nodes, with the line of each; None where there is nothing.

    Raises:
        yaml.YAMLError: See ``check``.
    """
    check(text)
    node: yaml.Node | None = yaml.compose(text, Loader=_LOADER)
    return node


class _Walk:
    """Reads parsing events in order; aliases count for all that they stand for."""

    def __init__(self) -> None:
        self.open = [_Collection(None, is_mapping=False)]
        self.sizes: dict[str, int] = {}

    def see(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.CollectionEndEvent):
            closed = self.open.pop()
            self._add(closed.values, closed.anchor, event)
        elif isinstance(event, yaml.NodeEvent):
            parent = self.open[-1]
            if parent.is_mapping and not parent.children % 2 and isinstance(event, yaml.ScalarEvent):
                self._check_key(event)
            parent.children += 1
            if isinstance(event, yaml.CollectionStartEvent):
                self._enter(event)
            elif isinstance(event, yaml.AliasEvent):
                self._add(self._size_of(event), None, event)
            elif isinstance(event, yaml.ScalarEvent):
                if event.implicit[0] and event.value[:1] in _NUMERIC and _is_no_number(event.value):
                    raise _refusal(f"{event.value} is not a finite number", event)
                self._add(1, event.anchor, event)

    def _enter(self, event: yaml.CollectionStartEvent) -> None:
        if len(self.open) > _DEEPEST:
            raise _refusal(f"nested more than {_DEEPEST} levels deep", event)
        self.open.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))

    def _size_of(self, alias: yaml.AliasEvent) -> int:
        if any(collection.anchor == alias.anchor for collection in self.open):
            raise _refusal(f"*{alias.anchor} stands inside &{alias.anchor}, which would hold itself", alias)
        return self.sizes.get(alias.anchor or "", 1)

    def _add(self, values: int, anchor: str | None, event: yaml.Event) -> None:
        if anchor is not None:
            self.sizes[anchor] = values
        self.open[-1].values += values
        if self.open[-1].values > _MOST_VALUES:
            raise _refusal(f"stands for more than {_MOST_VALUES:,} values, aliases written out", event)

    def _check_key(self, event: yaml.ScalarEvent) -> None:
        lines = self.open[-1].lines
        if event.value in lines and event.value != _MERGE:
            raise _refusal(f"'{event.value}' is given twice, first in line {lines[event.value]}", event)
        lines[event.value] = _mark(event).line + 1


def _is_no_number(text: str) -> bool:
    """Whether YAML would read it as infinite or as none, or its exponent is too large for a float."""
    if text.lstrip("+-").lower() in _NO_NUMBERS:
        return True
    try:
        return any(map(str.isdigit, text)) and "e" in text.lower() and math.isinf(float(text))
    except ValueError:
        return False


def _mark(event: yaml.Event) -> Any:
    return event.start_mark


def _refusal(problem: str, event: yaml.Event | None = None) -> StrictYAMLError:
    return StrictYAMLError(None, None, problem, _mark(event) if event else None)
