"""The passkey task (DuoAttention, arXiv 2410.10819, section 2.2): words hidden in a long text, asked for at its end.

Only the haystack is real text, as tokens; needles and questions are written anew for every sample. A sample is
exactly as long as it is asked to be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from kvtrain.data.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = npt.NDArray[np.int64]
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
_DEPTHS = np.linspace(0.05, 0.95, 1000)  # where needles may stand, as shares of the haystack


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


def passkey_texts() -> Iterator[str]:
    """Needles with their questions and no haystack, always the same: what a tokenizer learns the words from."""
    rng = np.random.default_rng(0)
    for _ in range(_TEXTS):
        keys = ["".join(f" {WORDS[word]}" for word in rng.integers(len(WORDS), size=8)) for _ in ORDINALS]
        needles = [_NEEDLE.format(ordinal) + key for ordinal, key in zip(ORDINALS, keys, strict=True)]
        answers = [_QUESTION.format(ordinal) + key for ordinal, key in zip(ORDINALS, keys, strict=True)]
        yield _PROLOGUE + "".join(needles) + _CLOSING + _SEPARATOR.join(answers)


class PasskeySample(NamedTuple):
    """One sample.

    Attributes:
        input_ids: ``(T,)``.
        labels: ``(T,)``, unshifted, ``-100`` where nothing is learnt.
        book: Tokens before the first question.
        answers: Where each answer's words lie, in the order of the needles.
    """

    input_ids: Ids
    labels: Ids
    book: int
    answers: list[slice]


class PasskeyWriter:
    """Writes samples of a task with one tokenizer.

    Args:
        tokenizer: Fast tokenizer.
        task: The task.

    Attributes:
        vocabulary: Ids that passkeys consist of.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", task: PasskeyTask) -> None:
        self.tokenizer, self.task = tokenizer, task
        beginning = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._prologue = np.concatenate([np.asarray(beginning, dtype=np.int64), self._ids(_PROLOGUE)])
        self._closing, self._separator = self._ids(_CLOSING), self._ids(_SEPARATOR)
        self._words = [self._ids(" " + word) for word in WORDS]
        self.vocabulary = np.unique(np.concatenate(self._words))

    def _ids(self, text: str) -> Ids:
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    @cached_property
    def _frames(self) -> list[tuple[Ids, Ids]]:
        """Needle and question of every ordinal, up to where the words begin."""
        return [(self._ids(_NEEDLE.format(ordinal)), self._ids(_QUESTION.format(ordinal))) for ordinal in ORDINALS]

    def sample(self, rng: np.random.Generator, haystack: Ids, length: int) -> PasskeySample:
        """Write one sample.

        Args:
            rng: Decides words and depths.
            haystack: Tokens to hide needles in; repeated where there are too few.
            length: Tokens of the sample.

        Raises:
            ValueError: Not even one passkey fits.
        """
        keys = [self._passkey(rng) for _ in range(self.task.passkeys)]
        while keys and self._overhead(keys) > length:
            keys.pop()
        if not keys:
            self._refuse(length)
        pages = np.resize(haystack, length - self._overhead(keys))
        parts = [self._prologue, *self._hide(rng, pages, keys), self._closing]
        begin = book = sum(part.size for part in parts)
        learnt, answers = [], []
        for (_, question), key in zip(self._frames, keys, strict=False):
            start = begin + question.size
            answers.append(slice(start, start + key.size))
            parts += [question, key, self._separator]
            learnt.append(slice(begin, start + key.size + self._separator.size))
            begin = learnt[-1].stop
        input_ids = np.concatenate(parts)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for span in learnt if self.task.supervision == "tail" else answers:
            labels[span] = input_ids[span]
        return PasskeySample(input_ids, labels, book, answers)

    def require(self, length: int) -> None:
        """Make sure that samples of so many tokens hold a passkey, whatever its words.

        Raises:
            ValueError: Some would not.
        """
        longest = max(self._words, key=len)
        if self._overhead([np.tile(longest, self.task.words)]) > length:
            self._refuse(length)

    def _refuse(self, length: int) -> NoReturn:
        raise ValueError(
            f"a sample of {length} tokens cannot hold a passkey of {self.task.words} words; "
            "lower words, or raise the length"
        )

    def _passkey(self, rng: np.random.Generator) -> Ids:
        return np.concatenate([self._words[word] for word in rng.integers(len(WORDS), size=self.task.words)])

    def _overhead(self, keys: list[Ids]) -> int:
        """Tokens of a sample beside the haystack's."""
        frames = sum(
            needle.size + question.size + 2 * (key.size + self._separator.size)
            for (needle, question), key in zip(self._frames, keys, strict=False)
        )
        return self._prologue.size + self._closing.size + frames

    def _hide(self, rng: np.random.Generator, book: Ids, keys: list[Ids]) -> list[Ids]:
        """The book in pieces, with a needle after each but the last."""
        depths = np.sort(rng.choice(_DEPTHS, size=len(keys), replace=False))
        pieces = np.split(book, (book.size * depths).astype(int))
        hidden: list[Ids] = []
        for piece, (needle, _), key in zip(pieces, self._frames, keys, strict=False):
            hidden += [piece, needle, key, self._separator]
        return [*hidden, pieces[-1]]


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
