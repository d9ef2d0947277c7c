"""Samples that hide something in a text, the same every time."""

from typing import Any

import numpy as np

from kvtrain.data.corpus import read_corpus
from kvtrain.data.haystack import Ids, Sample, SampleWriter

SAMPLES = 50  # where nobody says how many
_HAYSTACK = 1 << 18  # tokens of the corpus that are read


def draw_samples(writer: SampleWriter, haystack: Ids, length: int, count: int, seed: int = 0) -> list[Sample]:
    """The first samples of a seed, each of which is the same however many are drawn.

    Args:
        writer: Writes them.
        haystack: Tokens to hide something in; each sample takes a part of them.
        length: Tokens of a sample.
        count: Samples.
        seed: Of all of them.

    Raises:
        ValueError: There are none, or what is hidden does not fit.
    """
    samples = [_draw(writer, np.random.default_rng([seed, number]), haystack, length) for number in range(count)]
    if not samples:
        raise ValueError("no samples to measure on; let the limit be 1 or more")
    return samples


def _draw(writer: SampleWriter, rng: np.random.Generator, haystack: Ids, length: int) -> Sample:
    begin = int(rng.integers(max(1, haystack.size - length)))
    return writer.sample(rng, haystack[begin : begin + length], length)


def corpus_tokens(tokenizer: Any, corpus: str) -> Ids:
    """The beginning of a corpus as tokens.

    Args:
        tokenizer: The model's.
        corpus: See ``kvtrain.data.corpus.read_corpus``.

    Raises:
        ValueError: The corpus cannot be read or holds no text.
    """
    ids: list[int] = []
    for document in read_corpus(corpus):
        ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= _HAYSTACK:
            break
    if not ids:
        raise ValueError(f"{corpus}: the corpus is empty: no document holds any text")
    return np.asarray(ids, dtype=np.int64)
