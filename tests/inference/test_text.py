"""Text that grows by tokens."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.inference.engine.text import StopFinder, TextStream


@cache
def tiny_tokenizer():
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@given(ids=st.lists(st.one_of(st.integers(0, 4095), st.integers(2, 257)), max_size=30))
def test_pieces_are_the_whole_text(ids):
    """Characters of several tokens, broken ones and special tokens among them."""
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer.backend_tokenizer, ())
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_comes_whole(tokenizer):
    ids = tokenizer("é😀")["input_ids"]
    stream = TextStream(tokenizer.backend_tokenizer, ())
    pieces = [piece for token in ids if (piece := stream.push(token))]
    assert len(ids) > 2 and "".join(pieces) == "é😀" and "\ufffd" not in "".join(pieces)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_is_found_wherever_pieces_are_cut(pieces, stops):
    text, finder, shown, read = "".join(pieces), StopFinder(stops), "", ""
    for piece in pieces:
        shown, read = shown + finder.push(piece), read + piece
        held = read[len(shown) :]
        if finder.found is None:  # what is held back could become a stop string, and nothing else is
            assert read.startswith(shown) and (not held or any(stop.startswith(held) for stop in stops))
    shown += finder.flush()
    if finder.found is None:
        assert shown == text and not any(stop in text for stop in stops)
    else:
        assert shown + finder.found == text[: len(shown + finder.found)]
        first = next(end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops))
        assert len(shown) <= first, "nothing behind the end of the first one is shown"


def test_a_stop_string_over_token_borders_ends_the_text(tokenizer):
    ids = tokenizer("one two three four")["input_ids"]
    stream = TextStream(tokenizer.backend_tokenizer, ["o thr"])
    shown = "".join(stream.push(token) for token in ids) + stream.flush()
    assert shown == "one tw" and stream.stop == "o thr"
