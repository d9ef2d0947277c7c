"""RULER's kinds: exactly as long as asked, and what they ask for is what their text says, read by other means."""

import re
from collections import Counter

import numpy as np
import pytest

from kvtrain.data.ruler import RulerTask
from kvtrain.data.ruler_kinds import KINDS, NOISE, CommonWords, Facts, FrequentWords, Needles, VariableTracking
from kvtrain.data.tokenizer import load_tokenizer

LENGTH = 1024
HAYSTACK = "def f(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return np.asarray(tokenizer(HAYSTACK * 9, add_special_tokens=False)["input_ids"])


def sample_of(tokenizer, haystack, kind, length=LENGTH, seed=0):
    writer = RulerTask(kind, length).writer(tokenizer)
    return writer, writer.sample(np.random.default_rng([seed, 0]), haystack, length)


def parts(tokenizer, sample):
    """Text before the question, the question, and the answer that is expected."""
    book, start = sample.book, sample.answers[0].start
    cuts = [sample.input_ids[:book], sample.input_ids[book:start], sample.input_ids[start : sample.answers[0].stop]]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in cuts]


def needles(text, question):
    told = {}
    for key, value in re.findall(r"The code of ([\w-]+) is ([\w-]+)\.", text):
        told.setdefault(key, []).append(value)
    asked = re.fullmatch(r"What (?:is|are all) the codes? of (.+)\? The codes? of \1 (?:is|are)", question)[1].split(
        ", "
    )
    return [value for key in asked for value in told[key]], told


def variables(text, question):
    value, names = re.search(r"have the value (\d+)\?", question)[1], []
    for name, source in re.findall(r"VAR (\w+) = (\w+)\n", text):
        if source in (value, *names):
            names.append(name)
    return names


def most_common(text, count):
    counts = Counter(re.findall(r"[a-z]{6}\b", text.split("\n", 1)[1])).most_common()
    assert counts[count - 1][1] > counts[count][1], "nothing ties with the last that is asked for"
    return [word for word, _ in counts[:count]]


def home_town(text, question):
    found = {n: (t, h) for n, t, h in re.findall(r"\n(\w+) learnt from (\w+)\. The home town of \1 is (\w+)\.", text)}
    person = re.search(r"of (\w+)\?", question)[1]
    return [found[found[person][0] if "teacher" in question else person][1]], found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [700, LENGTH, 1501])
def test_samples_are_as_long_as_asked_and_ask_for_what_they_say(tokenizer, haystack, kind, length):
    writer, sample = sample_of(tokenizer, haystack, kind, length)
    assert sample.input_ids.shape == sample.labels.shape == (length,)
    text, question, answer = parts(tokenizer, sample)
    references, settings = writer.references(sample), KINDS[kind]
    assert answer == " " + ", ".join(references)
    match settings:
        case Needles():
            expected, told = needles(text, question)
            # Several values of a key come in any order, as does what RULER counts.
            assert sorted(references) == sorted(expected) and len(expected) == settings.asked * settings.values
            assert len(told) == settings.keys if settings.haystack != "blank" else len(told) >= 7
        case VariableTracking():
            assert references == variables(text, question) and len(references) == settings.hops + 1
        case CommonWords():
            assert sorted(references) == sorted(most_common(text, settings.common))
            listed = re.findall(r"(\d+)\. ([a-z]{6})\n", text)
            assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        case FrequentWords():
            assert references == most_common(text, settings.asked)
        case Facts():
            expected, told = home_town(text, question)
            assert references == expected and len(told) > 10


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("niah_single_1", NOISE.split(".")[0]),
        ("vt", NOISE.split(".")[0]),
        ("niah_single_2", "return a + b"),
        ("cwe", ""),
    ],
)
def test_a_haystack_is_noise_or_text_or_nothing(tokenizer, haystack, kind, sentence):
    text, *_ = parts(tokenizer, sample_of(tokenizer, haystack, kind)[1])
    assert text.count(sentence) > 20 if sentence else "return" not in text and "grass" not in text


def test_a_long_sample_is_full_of_needles_where_they_are_all_there_is(tokenizer, haystack):
    text, question, _ = parts(tokenizer, sample_of(tokenizer, haystack, "niah_multikey_3", 8192)[1])
    _, told = needles(text, question)
    uuid = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert len(told) > 80 and all(uuid.fullmatch(name) for pair in told.items() for name in (pair[0], *pair[1]))


@pytest.mark.parametrize("kind", ["niah_multiquery", "vt", "cwe", "fwe", "facts_2hop"])
def test_a_seed_says_all(tokenizer, haystack, kind):
    first, again, other = (sample_of(tokenizer, haystack, kind, 600, seed)[1].input_ids for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_coded_words_follow_the_law(tokenizer, haystack):
    text, *_ = parts(tokenizer, sample_of(tokenizer, haystack, "fwe", 4096)[1])
    counts = [count for _, count in Counter(re.findall(r"[a-z]{6}\b", text.split("\n", 1)[1])).most_common(8)]
    assert counts == [pytest.approx(counts[0] / rank**2, abs=1) for rank in range(1, 9)]


def test_common_words_come_as_often_as_there_is_room_for(tokenizer, haystack):
    for length, often in ((600, 4), (1100, 10), (4096, 30)):
        text, *_ = parts(tokenizer, sample_of(tokenizer, haystack, "cwe", length)[1])
        counts = Counter(re.findall(r"\d+\. ([a-z]{6})\n", text)).most_common()
        assert [count for _, count in counts[:10]] == [often] * 10
        assert {count for _, count in counts[10:]} == {3 if often == 30 else 1}


def test_what_does_not_fit_is_refused(tokenizer, haystack):
    with pytest.raises(ValueError, match="cannot hold its common words and the question of cwe; raise the length"):
        sample_of(tokenizer, haystack, "cwe", 100)
    with pytest.raises(ValueError, match="cannot hold the documents of two people"):
        RulerTask("facts_1hop", 64).writer(tokenizer).require(64)
    with pytest.raises(ValueError, match=r"unknown kind of ruler 'niah_single'\. Did you mean 'niah_single_"):
        RulerTask("niah_single", 1024)
