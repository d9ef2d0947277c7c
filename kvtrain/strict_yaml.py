"""YAML that somebody hands us, looked over before it is loaded: a tree of bounded size that says everything once.

YAML allows what no recipe needs and what no reader of plain values survives: a collection that holds itself, ten
lines that stand for a billion values, a key that is given twice and silently counts once, numbers that are none.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000
_DEEPEST = 64
_MERGE = "<<"
_NO_NUMBERS = (".nan", ".inf")
# All numbers that are infinite or none look like this, and few others: `.inf`, `1e999`.
_MAY_BE_NO_NUMBER = re.compile(r"[-+]*\.(nan|inf)\Z|[-+.\d].*e", re.IGNORECASE | re.DOTALL)
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
    if _WORDS.fullmatch(text) and not _MAY_BE_NO_NUMBER.match(text):
        return
    try:
        _check_events(yaml.parse(text, Loader=_LOADER))
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


def _check_events(events: Iterator[yaml.Event]) -> None:
    """Look over what a parser reads, in order; one loop, for a text may have a hundred thousand events."""
    outer: list[_Collection] = []
    inner = _Collection(None, is_mapping=False)  # the innermost that is open; at first the document
    sizes: dict[str, int] = {}  # how many values an anchor stands for
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            if len(outer) >= _DEEPEST:
                raise _refusal(f"nested more than {_DEEPEST} levels deep", event)
            inner.children += 1
            outer.append(inner)
            inner = _Collection(event.anchor, isinstance(event, yaml.MappingStartEvent))
            continue
        if isinstance(event, yaml.ScalarEvent):
            value, values, anchor = event.value, 1, event.anchor
            if event.implicit[0] and _MAY_BE_NO_NUMBER.match(value) and _is_no_number(value):
                raise _refusal(f"{value} is not a finite number", event)
            if inner.is_mapping and not inner.children % 2:
                if value in inner.lines and value != _MERGE:
                    raise _refusal(f"'{value}' is given twice, first in line {inner.lines[value]}", event)
                mark: Any = event.start_mark  # parsers of a text always know
                inner.lines[value] = mark.line + 1
            inner.children += 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {collection.anchor for collection in (*outer, inner)}:
                raise _refusal(f"*{event.anchor} stands inside &{event.anchor}, which would hold itself", event)
            values, anchor = sizes.get(event.anchor or "", 1), None
            inner.children += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            values, anchor, inner = inner.values, inner.anchor, outer.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = values
        inner.values += values
        if inner.values > _MOST_VALUES:
            raise _refusal(f"stands for more than {_MOST_VALUES:,} values, aliases written out", event)


def _is_no_number(text: str) -> bool:
    """Whether YAML would read it as infinite or as none, or its exponent is too large for a float."""
    if text.lstrip("+-").lower() in _NO_NUMBERS:
        return True
    try:
        return any(map(str.isdigit, text)) and "e" in text.lower() and math.isinf(float(text))
    except ValueError:
        return False


def _refusal(problem: str, event: Any = None) -> StrictYAMLError:
    return StrictYAMLError(None, None, problem, event.start_mark if event else None)
