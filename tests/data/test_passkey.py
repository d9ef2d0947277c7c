"""Passkey samples as a reader would check them: their text, their length, where needles stand, and what is learnt."""

import hashlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.data.passkey import WORDS, PasskeyTask, PasskeyWriter, copy_sample, passkey_texts

PROPERTY = settings(max_examples=40)
BOOK = 10**6  # tokens of the haystack begin here, where no tokenizer's do
HAYSTACK = np.arange(BOOK, BOOK + 50_000)
NUMBERS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
PASSKEY = r"(?: (?:{}))+".format("|".join(WORDS))
SAMPLE = re.compile(
    r"(?:<\|endoftext\|>)?This is a very long story book: <book> (?P<book>.*) </book>\.\n\n(?P<tail>.+)", re.DOTALL
)
NEEDLE = re.compile(rf"\n\nRemember this sequence of words, it's the (\w+) passkey to the vault:({PASSKEY})\n\n")
QUESTION = re.compile(
    rf"Based on the content of the book, what is the (\w+) passkey to the vault\?\nPasskey:({PASSKEY})\n\n"
)


@pytest.fixture(scope="module")
def write(tokenizer):
    """Samples by seed and length, of a task of so many passkeys and words."""

    def sample(length, seed=0, haystack=HAYSTACK, **task):
        writer = PasskeyWriter(tokenizer, PasskeyTask(**{"passkeys": 3, "words": 4, **task}))
        return writer.sample(np.random.default_rng(seed), haystack, length)

    return sample


def text_of(tokenizer, ids):
    """Its text, with every token of the haystack as one ``#``."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids >= BOOK)) + 1)
    return "".join("#" * run.size if run[0] >= BOOK else tokenizer.decode(run) for run in runs)


def parse(tokenizer, sample):
    """Passkeys by their needles and by the questions for them, and the haystack's tokens before each needle."""
    match = SAMPLE.fullmatch(text_of(tokenizer, sample.input_ids))
    assert match is not None
    needles, answers = NEEDLE.findall(match["book"]), QUESTION.findall(match["tail"])
    assert NEEDLE.sub("", match["book"]).strip("#") == "" and QUESTION.sub("", match["tail"]) == ""
    depths = [len(NEEDLE.sub("", match["book"][: found.start()])) for found in NEEDLE.finditer(match["book"])]
    return needles, answers, depths


@PROPERTY
@given(
    length=st.integers(460, 3000),
    seed=st.integers(0, 10**6),
    passkeys=st.integers(1, 10),
    words=st.integers(1, 12),
    supervision=st.sampled_from(["passkey", "tail"]),
)
def test_a_sample_is_what_the_paper_describes(tokenizer, write, length, seed, passkeys, words, supervision):
    sample = write(length, seed, passkeys=passkeys, words=words, supervision=supervision)
    ids, labels = sample.input_ids, sample.labels
    assert ids.shape == labels.shape == (length,) and ids.dtype == labels.dtype == np.int64
    needles, answers, depths = parse(tokenizer, sample)
    assert needles == answers and 1 <= len(needles) <= passkeys
    assert [number for number, _ in needles] == NUMBERS[: len(needles)]
    assert all(len(key.split()) == words for _, key in needles)
    book = ids[ids >= BOOK]
    assert np.array_equal(book, HAYSTACK[: book.size])
    assert depths == sorted(depths)
    assert all(int(0.05 * book.size) <= depth <= 0.95 * book.size for depth in depths)
    assert [tokenizer.decode(ids[answer]) for answer in sample.answers] == [key for _, key in answers]
    learnt = np.zeros(length, dtype=bool)
    for answer in sample.answers:
        learnt[answer] = True
    if supervision == "tail":
        learnt[:] = True
        learnt[: length - len(tail_ids(tokenizer, ids))] = False
    assert np.array_equal(labels, np.where(learnt, ids, IGNORE_INDEX))


def tail_ids(tokenizer, ids):
    """All from the first question on, which begins where the last needle's text has been closed."""
    for begin in range(ids.size - 1, -1, -1):
        if ids[begin] < BOOK and tokenizer.decode(ids[begin:][ids[begin:] < BOOK]).startswith(" </book>.\n\n"):
            closing = tokenizer(" </book>.\n\n", add_special_tokens=False)["input_ids"]
            assert ids[begin : begin + len(closing)].tolist() == closing
            return ids[begin + len(closing) :]
    raise AssertionError("no end of the book")


def test_the_same_seed_writes_the_same_sample(write):
    first, again = write(900, 5), write(900, 5)
    assert np.array_equal(first.input_ids, again.input_ids) and first.answers == again.answers
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.input_ids, write(900, 6).input_ids)


def test_samples_are_those_that_the_packaged_model_learnt_from(tokenizer):
    """To the bit, at every length: what is measured on them today can be compared with what was."""
    digests = {}
    for supervision in ("passkey", "tail"):
        writer, digest = PasskeyWriter(tokenizer, PasskeyTask(4, 8, supervision)), hashlib.sha256()
        for number in range(40):
            sample = writer.sample(np.random.default_rng([0, number]), np.arange(5000, 9000), 200 + 17 * number)
            digest.update(sample.input_ids.tobytes() + sample.labels.tobytes())
            digest.update(repr((sample.book, [(answer.start, answer.stop) for answer in sample.answers])).encode())
        digests[supervision] = digest.hexdigest()
    assert digests == {
        "passkey": "bc7f0e6741991d50248786d6779da7c417cda518bfbddb19b6e1b07d30fe7ab7",
        "tail": "cc03196723d8b6d5d90f1e633c8e165d09175ae59ae878e284fbdce8a3eb013d",
    }


def test_nothing_is_drawn_from_the_global_generator(write):
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    write(700)
    copy_sample(np.random.default_rng(0), HAYSTACK, 40, np.arange(9))
    assert np.random.get_state()[1].tolist() == before


def test_words_and_depths_are_uniform(tokenizer, write):
    """26 words with replacement; needles from a twentieth of the book to its other end."""
    found, places = [], []
    for seed in range(40):
        needles, _, depths = parse(tokenizer, write(12_000, seed, passkeys=10, words=30))
        assert {len(key.split()) for _, key in needles} == {30}
        found += [word for _, key in needles for word in key.split()]
        places += depths
    counts = np.unique(found, return_counts=True)[1]
    assert counts.size == 26 and counts.min() > 0.75 * len(found) / 26 and counts.max() < 1.25 * len(found) / 26
    shares = np.asarray(places) / max(places) * 0.95
    assert shares.min() < 0.06 and abs(shares.mean() - 0.5) < 0.03 and len(set(places)) > 0.9 * len(places)


@pytest.mark.parametrize("seed", range(3))
def test_every_length_from_the_smallest_that_fits(tokenizer, write, seed):
    """One passkey after the other as soon as there is room, the first ones first; below the first a clear refusal."""
    fits, refusals = [], []
    for length in range(40, 280):
        try:
            sample = write(length, seed)
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        assert sample.input_ids.size == length
        if len(sample.answers) > len(fits):
            assert len(sample.answers) == len(fits) + 1
            assert (sample.input_ids >= BOOK).sum() == 0  # not a token to spare
            fits.append(length)
    assert len(fits) == 3 and len(refusals) == fits[0] - 40
    for length, refusal in enumerate(refusals, 40):
        assert f"a sample of {length} tokens cannot hold a passkey of 4 words" in refusal
        assert "lower words, or raise the length" in refusal
    needles, _, _ = parse(tokenizer, write(fits[2], seed))
    assert needles[:1] == parse(tokenizer, write(fits[0], seed))[0]
    assert needles == parse(tokenizer, write(4000, seed))[0]


def test_a_short_haystack_is_repeated(write):
    ids = write(900, haystack=HAYSTACK[:7]).input_ids
    book = ids[ids >= BOOK]
    assert book.size > 400 and np.array_equal(book, HAYSTACK[np.arange(book.size) % 7])


def test_a_sample_begins_as_the_tokenizers_texts_do(tokenizer):
    """With its first token, or without where it has none."""
    samples = []
    for first in (0, 17, None):
        bare = SimpleNamespace(bos_token_id=first)
        bare_call = type("Bare", (), {"__call__": lambda _, *told, **more: tokenizer(*told, **more), **vars(bare)})
        writer = PasskeyWriter(bare_call(), PasskeyTask(passkeys=1, words=2))
        samples.append(writer.sample(np.random.default_rng(0), HAYSTACK, 200).input_ids)
    with_first, other, without = samples
    assert with_first[0] == 0 and other[0] == 17 and np.array_equal(with_first[1:], other[1:])
    opening = tokenizer("This is a very long story book: <book> ", add_special_tokens=False)["input_ids"]
    assert without[: len(opening)].tolist() == opening == other[1 : len(opening) + 1].tolist()
    assert without.size == other.size == 200


def test_texts_for_a_tokenizer():
    """As many as it takes, every time the same, in the words of the samples and without a haystack."""
    texts = list(passkey_texts())
    assert len(texts) == 2000 == len(set(texts)) and texts == list(passkey_texts())
    for text in texts[:50]:
        match = SAMPLE.fullmatch(text + "\n\n")
        needles, answers = NEEDLE.findall(re.sub(r"(?=\n\nRemember)|$", "\n\n", match["book"])), match["tail"]
        assert [number for number, _ in needles] == NUMBERS
        assert QUESTION.findall(answers) == needles and QUESTION.sub("", answers) == ""
    assert set(" ".join(texts).split()) >= set(WORDS) and len(WORDS) == 26


@pytest.mark.parametrize(
    ("task", "remedy"),
    [
        ({"passkeys": 0}, "from 1 to 10, not 0"),
        ({"passkeys": 11}, "from 1 to 10, not 11"),
        ({"words": 0}, "at least 1, not 0"),
        ({"supervision": "all"}, "supervision must be passkey or tail"),
    ],
)
def test_tasks_out_of_range_are_refused(task, remedy):
    with pytest.raises(ValueError, match=remedy):
        PasskeyTask(**task)


# Copying.


@PROPERTY
@given(st.integers(4, 300), st.integers(0, 10**6), st.integers(1, 400))
def test_a_run_is_repeated_and_learnt_from_its_second_time_on(length, seed, available):
    haystack, vocabulary = HAYSTACK[:available], np.arange(100, 160)
    ids, labels = copy_sample(np.random.default_rng(seed), haystack, length, vocabulary)
    assert ids.shape == labels.shape == (length,) and ids.dtype == labels.dtype == np.int64
    learnt = labels != IGNORE_INDEX
    run = int(learnt.argmax()) - 1  # the first token of a repetition cannot be known
    assert 2 <= run <= length // 2
    assert learnt[run + 1 :].all() and not learnt[: run + 1].any()
    assert np.array_equal(labels[learnt], ids[learnt]) and np.array_equal(ids[run:], ids[:-run])
    if ids[0] >= BOOK:
        assert np.array_equal(ids[:run], np.resize(haystack, run))
    else:
        assert np.isin(ids, vocabulary).all()


def test_runs_have_all_lengths_and_both_kinds():
    runs, kinds, tokens = [], [], []
    for seed in range(600):
        ids, labels = copy_sample(np.random.default_rng(seed), HAYSTACK, 12, np.arange(100, 110))
        runs.append(int((labels != IGNORE_INDEX).argmax()) - 1)
        kinds.append(ids[0] >= BOOK)
        tokens += [] if kinds[-1] else ids.tolist()
    assert set(runs) == {2, 3, 4, 5, 6} and np.bincount(runs)[2:].min() > 80
    assert 0.1 < np.mean(kinds) < 0.6
    assert set(tokens) == set(range(100, 110))
