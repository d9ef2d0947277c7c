"""Retrieval samples as a reader would check them: what names mean, what is asked, and what the answers say."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.data.retrieval import KINDS, RetrievalTask

PROPERTY = settings(max_examples=40)
BOOK = 10**6  # tokens of the haystack begin here, where no tokenizer's do
HAYSTACK = np.arange(BOOK, BOOK + 50_000)
NAME = r"[a-z]+ [a-z]+"
SAMPLE = re.compile(
    r"<\|endoftext\|>This text says what some names mean\.\n\n(?P<book>.*#)\n\n(?P<tail>What.+)", re.DOTALL
)
NEEDLE = re.compile(rf"\n\nIn this text ({NAME}) means ({NAME})\.\n\n")
ONE_HOP = re.compile(rf"What does ({NAME}) mean\? \1 means( {NAME})\.\n")
TWO_HOPS = re.compile(rf"What does ({NAME}) mean in the end\? \1 means( ({NAME}), and \3 means ({NAME}))\.\n")


@pytest.fixture(scope="module")
def write(tokenizer):
    """Samples by length and seed, of one kind."""

    def sample(length, kind, seed=0, haystack=HAYSTACK, **task):
        writer = RetrievalTask(**task, kinds={kind: 1.0}).writer(tokenizer)
        return writer.sample(np.random.default_rng(seed), haystack, length)

    return sample


def parse(tokenizer, sample):
    """What each name means, how deep that stands, and the questions with their answers."""
    runs = np.split(sample.input_ids, np.flatnonzero(np.diff(sample.input_ids >= BOOK)) + 1)
    text = "".join("#" * run.size if run[0] >= BOOK else tokenizer.decode(run) for run in runs)
    match = SAMPLE.fullmatch(text)
    assert match is not None and set(NEEDLE.sub("", match["book"])) == {"#"}
    facts = NEEDLE.findall(match["book"])
    depths = [len(NEEDLE.sub("", match["book"][: found.start()])) for found in NEEDLE.finditer(match["book"])]
    questions = ONE_HOP.findall(match["tail"]) or TWO_HOPS.findall(match["tail"])
    assert ONE_HOP.sub("", TWO_HOPS.sub("", match["tail"])) == ""
    return facts, depths, questions


@PROPERTY
@given(
    length=st.integers(500, 2000),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    keys=st.integers(2, 12),
    questions=st.integers(1, 2),
)
def test_answers_are_what_the_text_says(tokenizer, write, length, kind, seed, keys, questions):
    sample = write(length, kind, seed, keys=keys, questions=questions)
    ids = sample.input_ids
    assert ids.shape == sample.labels.shape == (length,) and ids.dtype == sample.labels.dtype == np.int64
    facts, depths, asked = parse(tokenizer, sample)
    means = dict(facts)
    assert len(means) == len(facts) == sample.needles == (1 if kind == "single" else keys)
    assert depths == sorted(depths)
    several = {"multiquery": questions, "multihop": min(questions, keys // 2)}
    assert len(asked) == len({key for key, *_ in asked}) == several.get(kind, 1)
    for key, answer, *hops in asked:
        assert answer == (
            f" {means[key]}" if not hops else f" {means[key]}, and {means[key]} means {means[means[key]]}"
        )
    assert [tokenizer.decode(ids[answer]) for answer in sample.answers] == [answer for _, answer, *_ in asked]
    assert tokenizer.decode(ids[sample.book :]).startswith("What does")
    learnt = np.zeros(length, dtype=bool)
    for answer in sample.answers:
        learnt[answer] = True
    assert np.array_equal(sample.labels, np.where(learnt, ids, IGNORE_INDEX))
    text = ids[ids >= BOOK]
    assert np.array_equal(text, HAYSTACK[: text.size])


def test_names_that_are_not_asked_for_mean_something_else(tokenizer, write):
    """No name is explained twice, no value belongs to two keys, and chains stand in either order."""
    orders = set()
    for seed in range(30):
        facts, _, questions = parse(tokenizer, write(1024, "multihop", seed, keys=7, questions=3))
        keys, values = ([fact[side] for fact in facts] for side in (0, 1))
        assert len({*keys}) == len({*values}) == 7 and len({*keys} & {*values}) == 3
        orders |= {keys.index(key) < keys.index(middle) for key, _, middle, _ in questions}
        assert len(questions) == 3
    assert orders == {True, False}


def test_the_same_seed_writes_the_same_sample(write):
    samples = {kind: [write(700, kind, seed) for seed in (5, 5, 6)] for kind in KINDS}
    for first, again, other in samples.values():
        assert np.array_equal(first.input_ids, again.input_ids) and np.array_equal(first.labels, again.labels)
        assert first.answers == again.answers and not np.array_equal(first.input_ids, other.input_ids)
    assert len({tuple(kind[0].input_ids) for kind in samples.values()}) == len(KINDS)


def test_kinds_are_drawn_by_their_shares(tokenizer):
    writer = RetrievalTask(keys=4, questions=4, kinds={"single": 1, "multiquery": 3, "multihop": 0}).writer(tokenizer)
    counts = [len(writer.sample(np.random.default_rng(seed), HAYSTACK, 400).answers) for seed in range(200)]
    assert set(counts) == {1, 4} and 0.65 < counts.count(4) / 200 < 0.85


def outcomes(attempt, lengths):
    """What an attempt gives for each length, or its refusal."""
    found = []
    for length in lengths:
        try:
            found.append(attempt(length))
        except ValueError as refusal:
            found.append(str(refusal))
    return found


@pytest.mark.parametrize(
    ("kind", "most", "least"),
    [
        ("multiquery", 5, "a name and its question; raise the length"),
        ("multihop", 2, "a chain of two names and its question; raise the length, or leave out the kind multihop"),
    ],
)
def test_as_many_keys_as_fit(tokenizer, kind, most, least):
    """And no fewer than the kind can ask for; below that a refusal in a line."""
    writer = RetrievalTask(keys=5, questions=5, kinds={kind: 1.0}).writer(tokenizer)
    lengths = range(30, 420)
    found = outcomes(lambda length: writer.sample(np.random.default_rng(1), HAYSTACK, length), lengths)
    refusals = [refusal for refusal in found if isinstance(refusal, str)]
    samples = found[len(refusals) :]
    assert refusals == [f"a sample of {length} tokens cannot hold {least}" for length in lengths[: len(refusals)]]
    assert [sample.input_ids.size for sample in samples] == list(lengths[len(refusals) :])
    counts = [len(sample.answers) for sample in samples]
    assert counts == sorted(counts) and set(counts) == set(range(1, most + 1))
    assert not (samples[0].input_ids >= BOOK).any()  # not a token to spare


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_long_enough_for_any_words_never_fails(tokenizer, kind):
    writer, lengths = RetrievalTask(kinds={kind: 1.0}).writer(tokenizer), range(30, 120)
    refused = [outcome is not None for outcome in outcomes(writer.require, lengths)]
    fits = lengths[refused.index(False)]
    assert refused == [length < fits for length in lengths]
    assert {writer.sample(np.random.default_rng(seed), HAYSTACK, fits).input_ids.size for seed in range(50)} == {fits}


def test_words_of_names_are_a_token_each(tokenizer):
    assert len(RetrievalTask().writer(tokenizer).vocabulary) == 30 + 64


@pytest.mark.parametrize(
    ("task", "remedy"),
    [
        ({"keys": 0}, "keys must be from 1 to 200, not 0"),
        ({"keys": 201}, "keys must be from 1 to 200, not 201"),
        ({"questions": 0}, "questions must be at least 1, not 0"),
        ({"kinds": {"multivalue": 1}}, "'multivalue' is no kind of retrieval; there are single, multikey"),
        ({"kinds": {"single": -1, "multikey": 3}}, "kinds must have shares, none negative"),
        ({"kinds": {"single": 0}}, "one of them above 0"),
        ({"kinds": {}}, "one of them above 0"),
        ({"keys": 1, "questions": 1}, "set keys to 2 or more, or leave the kind out"),
    ],
)
def test_tasks_out_of_range_are_refused(task, remedy):
    with pytest.raises(ValueError, match=remedy):
        RetrievalTask(**task)
