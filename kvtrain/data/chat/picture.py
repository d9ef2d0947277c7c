"""What is learned of some chats, to be looked at before anything trains: on a terminal, and as a page."""

import html
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from kvtrain.data.picture import Piece, pieces, print_sample
from kvtrain.data.shards import TokenShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES_PAGE = "samples.html"
NUM_SAMPLES = 3

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
            found.append(list(pieces(tokens[begin:end].tolist(), targets[begin:end].tolist(), tokenizer)))
    return found


def print_samples(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Print the samples of a folder of chats to standard output."""
    for number, sample in enumerate(samples(TokenShards(folder), tokenizer), 1):
        print_sample(f"sample {number}", sample, " (the rest is on the page)")


def write_page(path: Path, shards: TokenShards, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Write the samples of a folder of chats as a page that stands alone."""
    shown = samples(shards, tokenizer)
    blocks = [f"<pre>{''.join(map(_html, sample))}</pre>" for sample in shown]
    path.write_text(_PAGE.format(count=len(shown), samples="\n".join(blocks)), encoding="utf-8")


def _html(piece: Piece) -> str:
    text = html.escape(piece.text).replace("\n", "↵\n")
    return f'<span class="learned">{text}</span>' if piece.learned else f"<span>{text}</span>"
