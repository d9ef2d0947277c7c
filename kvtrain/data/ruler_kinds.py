"""The kinds of RULER's tasks (arXiv 2404.06654, section 3), as texts that are written anew for every sample.

Its needles in a haystack (one key, several keys, several values, several questions; words, numbers and UUIDs; among
noise, text, or needles alone), variable tracking, and the extraction of common and of frequent words. RULER's two kinds
of question answering are made of data sets; in their place stand questions about people who are invented here, with one
step or two to the answer. Prompts are our own, in our words, and show no example.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from kvtrain.data.haystack import Draft, Ids, Question

Encode = Callable[[str], Ids]
Haystack = Literal["text", "noise", "blank"]

SEPARATOR = ", "  # between the parts of an answer
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
_END = ".\n"
_FIRST = 16.0  # times that the most frequent coded word comes at least: then no two of the first four tie


class Kind(ABC):
    """One kind of task.

    Attributes:
        haystack: What needles are hidden in: text, noise, or hardly anything, where the needles fill the sample.
        prologue: Text before it.
        tokens: Of an answer at most, as RULER bounds it.
        least: What the least is that a sample must hold.
    """

    haystack: Haystack = "blank"
    prologue: ClassVar[str]
    tokens: int
    least: ClassVar[str]

    @abstractmethod
    def draft(self, encode: Encode, rng: np.random.Generator, room: int) -> Draft:
        """What one sample hides and asks for.

        Args:
            encode: Tokens of a text.
            rng: Decides the words.
            room: Tokens that there are for needles and question; kinds without a haystack fill them.
        """


def _ask(encode: Encode, question: str, answers: list[str]) -> Question:
    return Question(encode(question), encode(" " + SEPARATOR.join(answers)), encode(_END))


def words(rng: np.random.Generator, syllables: int = 3) -> Iterator[str]:
    """Words of so many syllables that one may say and that mean nothing, each once, without end."""
    seen: set[int] = set()
    while True:
        number = int(rng.integers(len(_SYLLABLES) ** syllables))
        if number not in seen:
            seen.add(number)
            yield "".join(
                _SYLLABLES[number // len(_SYLLABLES) ** place % len(_SYLLABLES)] for place in range(syllables)
            )


def numbers(rng: np.random.Generator) -> Iterator[str]:
    """Numbers of seven digits, each once."""
    seen: set[int] = set()
    while True:
        number = int(rng.integers(1_000_000, 10_000_000))
        if number not in seen:
            seen.add(number)
            yield str(number)


def uuids(rng: np.random.Generator) -> Iterator[str]:
    """UUIDs, drawn at random."""
    while True:
        yield str(uuid.UUID(bytes=rng.bytes(16), version=4))


_NAMES = {"words": words, "numbers": numbers, "uuids": uuids}


@dataclass(frozen=True)
class Needles(Kind):
    """Keys with values.

    Args:
        haystack: What they are hidden in; ``"blank"``: as many as there is room for, beside nothing else.
        keys: How many.
        values: Of each key.
        asked: Keys that are asked for; the others distract.
        key_form: What a key is.
        value_form: What a value is.
        tokens: See ``Kind``.
    """

    haystack: Haystack = "text"
    keys: int = 1
    values: int = 1
    asked: int = 1
    key_form: str = "words"
    value_form: str = "numbers"
    tokens: int = 128

    prologue: ClassVar[str] = "This text says what the codes of some things are. Remember them.\n\n"
    least: ClassVar[str] = "its keys, their values and the question"

    def draft(self, encode: Encode, rng: np.random.Generator, room: int) -> Draft:
        """See ``Kind``."""
        keys, values = _NAMES[self.key_form](rng), _NAMES[self.value_form](rng)
        asked = {next(keys): [next(values) for _ in range(self.values)] for _ in range(self.asked)}
        question = self._question(encode, asked)
        pairs = [(key, value) for key, of_key in asked.items() for value in of_key]
        if self.haystack == "blank":
            return Draft(
                [self._fill(encode, rng, pairs, room - _size(question), zip(keys, values, strict=False))], [question]
            )
        pairs += [(next(keys), next(values)) for _ in range((self.keys - self.asked) * self.values)]
        return Draft([self._needle(encode, *pairs[place]) for place in rng.permutation(len(pairs))], [question])

    def _fill(
        self,
        encode: Encode,
        rng: np.random.Generator,
        pairs: list[tuple[str, str]],
        room: int,
        more: Iterator[tuple[str, str]],
    ) -> Ids:
        """One text of all that fits, in any order."""
        needles = [self._needle(encode, *pair) for pair in pairs]
        room -= sum(needle.size for needle in needles)
        for pair in more:
            needle = self._needle(encode, *pair)
            room -= needle.size
            if room < 0:
                break
            needles.append(needle)
        return np.concatenate([needles[place] for place in rng.permutation(len(needles))])

    def _needle(self, encode: Encode, key: str, value: str) -> Ids:
        return encode(f"\nThe code of {key} is {value}.\n")

    def _question(self, encode: Encode, asked: dict[str, list[str]]) -> Question:
        names, answers = SEPARATOR.join(asked), [value for values in asked.values() for value in values]
        if len(answers) == 1:
            return _ask(encode, f"What is the code of {names}? The code of {names} is", answers)
        return _ask(encode, f"What are all the codes of {names}? The codes of {names} are", answers)


@dataclass(frozen=True)
class VariableTracking(Kind):
    """A chain of variables, each of which gets the value of the one before.

    Args:
        hops: Steps from the first to the last.
        haystack: What they are hidden in.
        tokens: See ``Kind``.
    """

    hops: int = 4
    haystack: Haystack = "noise"
    tokens: int = 30

    prologue: ClassVar[str] = "This text gives values to some variables. Remember which have which.\n\n"
    least: ClassVar[str] = "its chain of variables and the question"

    def draft(self, encode: Encode, rng: np.random.Generator, room: int) -> Draft:
        """See ``Kind``; the chain stands in its order."""
        drawn, value = words(rng, 2), str(int(rng.integers(10_000, 100_000)))
        names = [next(drawn).upper() for _ in range(self.hops + 1)]
        sources = [value, *names[:-1]]
        needles = [encode(f"\nVAR {name} = {source}\n") for name, source in zip(names, sources, strict=True)]
        question = f"Which variables have the value {value}? The variables with the value {value} are"
        return Draft(needles, [_ask(encode, question, names)])


@dataclass(frozen=True)
class CommonWords(Kind):
    """A numbered list in which some words come often and all others seldom.

    Args:
        common: Words that come often.
        often: How many times, in samples that have room for it; in shorter ones a third of it, or 4 times.
        seldom: How many times the others come; once in shorter samples.
        tokens: See ``Kind``.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3
    tokens: int = 120

    prologue: ClassVar[str] = "This is a list of words. Remember those that come most often.\n\n"
    least: ClassVar[str] = "its common words and the question"

    def draft(self, encode: Encode, rng: np.random.Generator, room: int) -> Draft:
        """See ``Kind``."""
        drawn = words(rng)
        common = [next(drawn) for _ in range(self.common)]
        count_words = "ten" if self.common == 10 else str(self.common)
        question = _ask(encode, f"Which {count_words} words come most often in the list? They are", common)
        room -= _size(question)
        for often, seldom in ((self.often, self.seldom), (self.often // 3, 1), (4, 1)):
            listed = self._fill(encode, common, often, seldom, drawn, room)
            if len(listed) > len(common) * often:
                break
        order = rng.permutation(len(listed))
        entries = [part for number, place in enumerate(order, 1) for part in (_number(encode, number), listed[place])]
        return Draft([np.concatenate(entries)], [question])

    def _fill(
        self, encode: Encode, common: list[str], often: int, seldom: int, drawn: Iterator[str], room: int
    ) -> list[Ids]:
        """The entries of a list that fits, if it can: common words, and other ones while there is room."""
        listed = [encode(f" {word}\n") for word in common] * often
        room -= sum(entry.size for entry in listed) + sum(_number(encode, n).size for n in range(1, len(listed) + 1))
        for word in drawn:
            entry = encode(f" {word}\n")
            room -= seldom * (entry.size + _number(encode, len(listed) + seldom).size)
            if room < 0:
                return listed
            listed += [entry] * seldom
        raise AssertionError  # words have no end


def _number(encode: Encode, number: int) -> Ids:
    return encode(f"{number}.")


@dataclass(frozen=True)
class FrequentWords(Kind):
    """A text of coded words whose frequencies follow Zipf's law.

    Args:
        asked: How many of the most frequent are asked for.
        exponent: Of the law; the word of rank ``k`` comes as often as ``k ** -exponent`` says.
        tokens: See ``Kind``.
    """

    asked: int = 3
    exponent: float = 2.0
    tokens: int = 50

    prologue: ClassVar[str] = "This is a coded text. Remember which coded words come most often.\n\n"
    least: ClassVar[str] = "as many words as rank the most frequent ones, and the question"

    def draft(self, encode: Encode, rng: np.random.Generator, room: int) -> Draft:
        """See ``Kind``; of the law's tail there is as much as there is room for."""
        drawn = words(rng)
        top = [next(drawn) for _ in range(self.asked)]
        names = {3: "three"}.get(self.asked, str(self.asked))
        question = _ask(encode, f"Which {names} coded words come most often? They are", top)
        room -= _size(question)
        entries = [encode(f" {word}") for word in top]
        first = room / max(1, entries[0].size)  # times that the first word comes: all, and less and less
        while first > _FIRST and self._tokens(first, entries, encode, drawn) > room:
            first *= 0.98
        counts = self._counts(max(first, _FIRST))
        self._tokens(max(first, _FIRST), entries, encode, drawn)
        text = [entry for entry, often in zip(entries, counts, strict=False) for _ in range(often)]
        room -= sum(entry.size for entry in text)
        while (entry := encode(f" {next(drawn)}")).size <= room:
            text.append(entry)
            room -= entry.size
        return Draft([np.concatenate([text[place] for place in rng.permutation(len(text))])], [question])

    def _counts(self, first: float) -> list[int]:
        """Times that the word of each rank comes, down to once."""
        ranks = range(1, int((2 * first) ** (1 / self.exponent)) + 1)
        return [often for rank in ranks if (often := round(first * rank**-self.exponent))]

    def _tokens(self, first: float, entries: list[Ids], encode: Encode, drawn: Iterator[str]) -> int:
        """Tokens of a text in which the first word comes so often; words join ``entries`` as ranks need them."""
        counts = self._counts(first)
        entries += [encode(f" {next(drawn)}") for _ in range(len(counts) - len(entries))]
        return sum(often * entry.size for often, entry in zip(counts, entries, strict=False))


@dataclass(frozen=True)
class Facts(Kind):
    """Paragraphs about people, of whom one is asked about.

    Args:
        hops: 1: where somebody lives; 2: where the teacher of somebody lives.
        tokens: See ``Kind``.
    """

    hops: Literal[1, 2] = 1
    tokens: int = 32

    prologue: ClassVar[str] = "These documents are about people. Answer the question behind them.\n\n"
    least: ClassVar[str] = "the documents of two people and the question"

    def draft(self, encode: Encode, rng: np.random.Generator, room: int) -> Draft:
        """See ``Kind``."""
        drawn, people = words(rng), list[tuple[str, str]]()
        person, teacher, place, other = (next(drawn).capitalize() for _ in range(4))
        people = [(person, place), (teacher, other)]
        pupils = {person: teacher, teacher: next(drawn).capitalize()}
        asked = f"What is the home town of {person}? The home town of {person} is"
        if self.hops == 2:
            asked = f"What is the home town of the teacher of {person}? The home town of {person}'s teacher is"
        question = _ask(encode, asked, [place if self.hops == 1 else other])
        documents = [self._document(encode, name, town, pupils[name]) for name, town in people]
        room -= _size(question) + sum(document.size for document in documents)
        while True:
            document = self._document(encode, *(next(drawn).capitalize() for _ in range(3)))
            room -= document.size
            if room < 0:
                break
            documents.append(document)
        return Draft([np.concatenate([documents[place] for place in rng.permutation(len(documents))])], [question])

    def _document(self, encode: Encode, name: str, town: str, teacher: str) -> Ids:
        return encode(f"\nDocument about {name}.\n{name} learnt from {teacher}. The home town of {name} is {town}.\n")


def _size(question: Question) -> int:
    return sum(part.size for part in question)


KINDS: dict[str, Kind] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value_form="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="blank"),
    "niah_multikey_3": Needles(haystack="blank", key_form="uuids", value_form="uuids"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, asked=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "facts_1hop": Facts(),
    "facts_2hop": Facts(hops=2),
}
