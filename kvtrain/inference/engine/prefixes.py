"""Rows kept after their use, for prompts that begin with the tokens they hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

_BLOCK = 256


def common_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(first), len(second))
    for begin in range(0, shorter, _BLOCK):
        mine, theirs = first[begin : begin + _BLOCK], second[begin : begin + _BLOCK]
        if mine != theirs:
            pairs = zip(mine, theirs, strict=False)
            return begin + next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
    return shorter


@dataclass(eq=False)
class KeptRow:
    """A row that nobody uses at present.

    Attributes:
        tokens: What it holds.
        row: Where.
        branch: Whether prompts part behind it: then it is copied, and stays.
        used: When it was used last.
    """

    tokens: tuple[int, ...]
    row: Any
    branch: bool
    used: int


class Match(NamedTuple):
    """A kept row and how many of its tokens a prompt begins with."""

    kept: KeptRow
    length: int


class KeptRows:
    """Kept rows, of which the least recently used one goes first.

    Args:
        shortest: Beginnings below this length are not worth a row.
        rollback: Whether rows can be cut to any length; otherwise a prompt must begin with all that a row holds.
    """

    def __init__(self, shortest: int, rollback: bool) -> None:
        self._shortest, self._rollback = shortest, rollback
        self._kept: dict[tuple[int, ...], KeptRow] = {}
        self._clock = count()

    def __len__(self) -> int:
        return len(self._kept)

    def rows(self) -> list[Any]:
        """All of them."""
        return [kept.row for kept in self._kept.values()]

    def add(self, tokens: tuple[int, ...], row: Any, branch: bool) -> Any:
        """Keep a row; the row that held the same tokens until now, or None."""
        former = self._kept.pop(tokens, None)
        branch = branch or (former is not None and former.branch)
        self._kept[tokens] = KeptRow(tokens, row, branch, next(self._clock))
        return None if former is None else former.row

    def find(self, prompt: tuple[int, ...]) -> Match | None:
        """The row that saves most of a prompt, whose last token is read in any case."""
        matches = (Match(kept, self._shared(kept.tokens, prompt)) for kept in self._kept.values())
        best = max(matches, key=lambda match: match.length, default=None)
        if best is None or best.length < self._shortest:
            return None
        best.kept.used = next(self._clock)
        return best

    def _shared(self, tokens: tuple[int, ...], prompt: tuple[int, ...]) -> int:
        most = len(prompt) - 1
        if self._rollback:
            return min(most, common_length(tokens, prompt))
        return len(tokens) if len(tokens) <= most and prompt[: len(tokens)] == tokens else 0

    def remove(self, kept: KeptRow) -> Any:
        """Give a row away."""
        return self._kept.pop(kept.tokens).row

    def evict(self, spared: KeptRow | None = None) -> Any:
        """The least recently used row, which is kept no longer; None where there is no other than the spared one."""
        rest = (kept for kept in self._kept.values() if kept is not spared)
        oldest = min(rest, key=lambda kept: kept.used, default=None)
        return None if oldest is None else self.remove(oldest)


def parting(prompt: tuple[int, ...], others: Iterable[tuple[int, ...]], shortest: int) -> int | None:
    """Where a prompt parts from others, so that what is read up to there saves them most; None where it saves nothing.

    Args:
        prompt: About to be read.
        others: Prompts that wait, or that came lately.
        shortest: Beginnings below this length, such as what is there already, are not worth a copy.
    """
    most = len(prompt) - 1
    lengths = sorted(min(most, common_length(prompt, other)) for other in others)
    saved = [(length * (len(lengths) - place), length) for place, length in enumerate(lengths) if length >= shortest]
    return max(saved)[1] if saved else None
