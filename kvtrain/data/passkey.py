"""The passkey task (DuoAttention, arXiv 2410.10819, section 2.2): words hidden in a long text, asked for at its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from kvtrain.data.haystack import Draft, Ids, Question, SampleWriter
from kvtrain.data.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Supervision = Literal["passkey", "tail"]

_ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
_NUMBERS = "first second third fourth fifth sixth seventh eighth ninth tenth"
WORDS, ORDINALS = _ALPHABET.split(), _NUMBERS.split()

_PROLOGUE = "This is a very long story book: <book> "
_CLOSING = " </book>.\n\n"
_NEEDLE = "\n\nRemember this sequence of words, it's the {} passkey to the vault:"
_QUESTION = "Based on the content of the book, what is the {} passkey to the vault?\nPasskey:"
_SEPARATOR = "\n\n"
_TEXTS = 2000
_TEXT_SHARE = 0.25  # of the runs to be copied


@dataclass(frozen=True)
class PasskeyTask:
    """How much is hidden, and what of the answers is learnt.

    Args:
        passkeys: Needles in a sample, at most; a sample too short for all of them holds as many as fit.
        words: Words in a passkey, drawn from 26 with replacement.
        supervision: ``"passkey"``: the words of the answers (the paper); ``"tail"``: questions and separators, too
            (the released code).

    Raises:
        ValueError: A value is out of range.
    """

    passkeys: int = 10
    words: int = 32
    supervision: Supervision = "passkey"

    def __post_init__(self) -> None:
        if not 1 <= self.passkeys <= len(ORDINALS):
            raise ValueError(f"passkeys must be from 1 to {len(ORDINALS)}, not {self.passkeys}")
        if self.words < 1:
            raise ValueError(f"words must be at least 1, not {self.words}")
        if self.supervision not in get_args(Supervision):
            raise ValueError(f"supervision must be {' or '.join(get_args(Supervision))}, not {self.supervision!r}")

    def writer(self, tokenizer: "PreTrainedTokenizerFast") -> "PasskeyWriter":
        """Who writes samples of it."""
        return PasskeyWriter(tokenizer, self)


def passkey_texts() -> Iterator[str]:
    """Needles with their questions and no haystack, always the same: what a tokenizer learns the words from."""
    rng = np.random.default_rng(0)
    for _ in range(_TEXTS):
        keys = ["".join(f" {WORDS[word]}" for word in rng.integers(len(WORDS), size=8)) for _ in ORDINALS]
        needles = [_NEEDLE.format(ordinal) + key for ordinal, key in zip(ORDINALS, keys, strict=True)]
        answers = [_QUESTION.format(ordinal) + key for ordinal, key in zip(ORDINALS, keys, strict=True)]
        yield _PROLOGUE + "".join(needles) + _CLOSING + _SEPARATOR.join(answers)


class PasskeyWriter(SampleWriter):
    """Writes samples of a task with one tokenizer; see ``SampleWriter``.

    Args:
        tokenizer: Fast tokenizer.
        task: The task.
    """

    prologue, closing = _PROLOGUE, _CLOSING

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", task: PasskeyTask) -> None:
        super().__init__(tokenizer)
        self.task, self.learns_questions = task, task.supervision == "tail"
        self._separator = self.ids(_SEPARATOR)
        self._words = [self.ids(" " + word) for word in WORDS]
        self.vocabulary = np.unique(np.concatenate(self._words))

    @cached_property
    def _frames(self) -> list[tuple[Ids, Ids]]:
        """Needle and question of every ordinal, up to where the words begin."""
        return [(self.ids(_NEEDLE.format(ordinal)), self.ids(_QUESTION.format(ordinal))) for ordinal in ORDINALS]

    def drafts(self, rng: np.random.Generator) -> Iterator[Draft]:
        """See ``SampleWriter``; the first passkeys stay."""
        keys = [
            np.concatenate([self._words[word] for word in rng.integers(len(WORDS), size=self.task.words)])
            for _ in range(self.task.passkeys)
        ]
        for count in range(len(keys), 0, -1):
            yield self._draft(keys[:count])

    def longest(self) -> Draft:
        """See ``SampleWriter``; one passkey."""
        return self._draft([np.tile(max(self._words, key=len), self.task.words)])

    @property
    def least(self) -> str:
        """See ``SampleWriter``."""
        return f"a passkey of {self.task.words} words; lower words, or raise the length"

    def _draft(self, keys: list[Ids]) -> Draft:
        framed = list(zip(self._frames, keys, strict=False))
        return Draft(
            [np.concatenate([needle, key, self._separator]) for (needle, _), key in framed],
            [Question(question, key, self._separator) for (_, question), key in framed],
        )


def copy_sample(rng: np.random.Generator, haystack: Ids, length: int, vocabulary: Ids) -> tuple[Ids, Ids]:
    """A run of tokens, repeated until the sample is full: what a model must copy before it can find a passkey.

    Args:
        rng: Decides the run's length, and whether it is text or random tokens.
        haystack: Text to take the run from.
        length: Tokens of the sample, at least 4.
        vocabulary: Ids that random runs are drawn from; few are learnt soonest.

    Returns:
        Ids ``(T,)`` and unshifted labels ``(T,)``: the repetitions, less the first token of the first one.
    """
    run = int(rng.integers(2, length // 2 + 1))
    source = np.resize(haystack, run) if rng.random() < _TEXT_SHARE else rng.choice(vocabulary, size=run)
    input_ids = np.resize(source, length).astype(np.int64)
    labels = input_ids.copy()
    labels[: run + 1] = IGNORE_INDEX
    return input_ids, labels
