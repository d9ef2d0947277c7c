"""Tokens as text, with those that are learned told apart: on a terminal in color, or between marks."""

import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MOST_SHOWN = 1500  # characters on a terminal
_LEARNED, _PLAIN = "\x1b[32;1m", "\x1b[0m"  # bold green
_MARKS = "⟦", "⟧"
_UNFINISHED = "\ufffd"  # what a part of a character decodes to


class Piece(NamedTuple):
    """Text of one token, or of a few that share a character, and whether it is learned."""

    text: str
    learned: bool


def pieces(ids: list[int], targets: list[bool], tokenizer: "PreTrainedTokenizerFast") -> Iterator[Piece]:
    """Text of tokens, each by itself where it has whole characters.

    Args:
        ids: ``(T,)``.
        targets: ``(T,)``, which are learned.
        tokenizer: Whose they are.
    """
    begin = 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not text.endswith(_UNFINISHED) or end == len(ids) or targets[end] != targets[begin]:
            yield Piece(text, targets[begin])
            begin = end


def terminal_text(sample: list[Piece], colors: bool, rest: str = "") -> str:
    """A sample with what is learned in color, or between marks where there are no colors.

    Args:
        sample: Its pieces.
        colors: Whether there are.
        rest: Where more of it is than fits.
    """
    before, after = (_LEARNED, _PLAIN) if colors else _MARKS
    runs = [
        ("".join(piece.text for piece in group), learned)
        for learned, group in itertools.groupby(sample, key=lambda piece: piece.learned)
    ]
    shown, left = "", _MOST_SHOWN
    for text, learned in runs:
        part = text[:left]
        shown += f"{before}{part}{after}" if learned else part
        left -= len(part)
        if not left:
            return f"{shown} …{rest}"
    return shown


def print_sample(title: str, sample: list[Piece], rest: str = "") -> None:
    """Print a sample to standard output.

    Args:
        title: What it is.
        sample: Its pieces.
        rest: Where more of it is than fits.
    """
    colors = sys.stdout.isatty()
    print(f"--- {title}, what is learned {'in green' if colors else 'between ⟦ and ⟧'} ---")
    print(terminal_text(sample, colors, rest))
    print("---")
