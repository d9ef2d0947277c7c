"""What is learned of some chats, to be looked at before anything trains: on a terminal, and as a page."""

import html
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtrain.data.shards import TokenShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES_PAGE = "samples.html"
NUM_SAMPLES = 3
_MOST_SHOWN = 1500  # characters of a sample on a terminal
_LEARNED, _PLAIN = "\x1b[32;1m", "\x1b[0m"  # bold green
_MARKS = "⟦", "⟧"
_UNFINISHED = "\ufffd"  # what a part of a character decodes to

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Samples of chats</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
 pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: 1em; border-radius: 6px; }}
 span {{ color: #777; box-shadow: inset -1px 0 #e3e3e0; }}
 .learned {{ color: #0b3d20; background: #c9efd6; box-shadow: inset -1px 0 #9fd8b4; }}
</style>
<h1>Samples of chats</h1>
<p>The first {count} texts as they are trained. Tokens <span class="learned">on green</span> are in the loss, the gray
ones are read alone; a line ends each token, and ↵ stands for the line breaks inside them.</p>
{samples}
</html>
"""


class Piece(NamedTuple):
    """Text of one token, or of a few that share a character, and whether it is learned."""

    text: str
    learned: bool


def samples(shards: TokenShards, tokenizer: "PreTrainedTokenizerFast", count: int = NUM_SAMPLES) -> list[list[Piece]]:
    """The first texts of a folder of chats, in pieces.

    Args:
        shards: Open folder of chats.
        tokenizer: What wrote them.
        count: How many, if there are as many.
    """
    found: list[list[Piece]] = []
    for tokens, starts, targets in zip(shards.tokens, shards.starts, shards.targets, strict=True):
        borders = [*starts[: count + 1].tolist(), int(tokens.size)]
        for begin, end in itertools.islice(itertools.pairwise(borders), count - len(found)):
            found.append(list(_pieces(tokens[begin:end].tolist(), targets[begin:end].tolist(), tokenizer)))
    return found


def _pieces(ids: list[int], targets: list[bool], tokenizer: "PreTrainedTokenizerFast") -> Iterator[Piece]:
    begin = 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not text.endswith(_UNFINISHED) or end == len(ids) or targets[end] != targets[begin]:
            yield Piece(text, targets[begin])
            begin = end


def terminal_text(sample: list[Piece], colors: bool) -> str:
    """A sample with what is learned in color, or between marks where there are no colors."""
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
            return f"{shown} … (the rest is on the page)"
    return shown


def print_samples(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Print the samples of a folder of chats to standard output."""
    colors = sys.stdout.isatty()
    how = "in green" if colors else "between ⟦ and ⟧"
    for number, sample in enumerate(samples(TokenShards(folder), tokenizer), 1):
        print(f"--- sample {number}, what is learned {how} ---")
        print(terminal_text(sample, colors))
    print("---")


def write_page(path: Path, shards: TokenShards, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Write the samples of a folder of chats as a page that stands alone."""
    shown = samples(shards, tokenizer)
    blocks = [f"<pre>{''.join(map(_html, sample))}</pre>" for sample in shown]
    path.write_text(_PAGE.format(count=len(shown), samples="\n".join(blocks)), encoding="utf-8")


def _html(piece: Piece) -> str:
    text = html.escape(piece.text).replace("\n", "↵\n")
    return f'<span class="learned">{text}</span>' if piece.learned else f"<span>{text}</span>"
