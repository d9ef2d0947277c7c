"""Text as windows of tokens, document by document."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtrain.data.corpus import read_corpus


class Window(NamedTuple):
    """Tokens, the index of the first that is a target, and the bytes of text that the targets stand for."""

    ids: list[int]
    first_target: int
    num_bytes: int


def corpus_windows(tokenizer: Any, corpus: str, length: int, stride: int) -> Iterator[Window]:
    """Windows that slide over every document of a corpus.

    Args:
        tokenizer: The model's.
        corpus: See ``kvtrain.data.corpus.read_corpus``.
        length: Tokens of a window at most, its start token included.
        stride: Tokens from one window to the next: those are the targets, at its end; the first window has all.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)
    for document in read_corpus(corpus):
        encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [0, *(end for _, end in encoded["offset_mapping"])]
        scored = 0
        for begin in range(0, len(ids), min(stride, body)):
            if scored == len(ids):
                break
            window = [*start, *ids[begin : begin + body]]
            first = max(1, len(start) + scored - begin)
            scored, unscored = begin + len(window) - len(start), begin + first - len(start)
            if first < len(window):
                yield Window(window, first, len(document.text[ends[unscored] : ends[scored]].encode()))


def full_windows(tokenizer: Any, corpus: str, length: int, limit: int | None = None) -> Tensor:
    """Windows that do not overlap and are all equally long, ``(N, length)``; what documents end with is left out.

    Args:
        tokenizer: The model's.
        corpus: See ``kvtrain.data.corpus.read_corpus``.
        length: Tokens of a window, its start token included.
        limit: Windows to read; None reads all.

    Raises:
        ValueError: The corpus cannot be read, or no document is long enough.
    """
    windows = corpus_windows(tokenizer, corpus, length, length)
    found = list(islice((window.ids for window in windows if len(window.ids) == length), limit))
    if not found:
        raise ValueError(f"{corpus}: no document has {length} tokens; lower the sequence length")
    return torch.tensor(found)
