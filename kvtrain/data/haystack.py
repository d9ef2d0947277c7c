"""Samples of tasks that hide things in a long text and ask for them at its end.

Only the haystack is real text, as tokens; what is hidden in it and what is asked is written anew for every sample. A
sample is exactly as long as it is asked to be.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from kvtrain.data.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = npt.NDArray[np.int64]
_DEPTHS = np.linspace(0.05, 0.95, 1000)  # where needles may stand, as shares of the haystack


class Sample(NamedTuple):
    """One sample.

    Attributes:
        input_ids: ``(T,)``.
        labels: ``(T,)``, unshifted, ``-100`` where nothing is learnt.
        book: Tokens before the first question.
        answers: Where each answer lies, in the order of the questions.
        needles: How much is hidden: no more than what the task asks for, where the sample is short.
    """

    input_ids: Ids
    labels: Ids
    book: int
    answers: list[slice]
    needles: int


class Question(NamedTuple):
    """What is asked behind the haystack: tokens up to the answer, the answer's, and those that end it."""

    question: Ids
    answer: Ids
    end: Ids


class Draft(NamedTuple):
    """What one sample hides, in the order of its depths, and asks for."""

    needles: list[Ids]
    questions: list[Question]

    @property
    def size(self) -> int:
        """Tokens of both."""
        return sum(needle.size for needle in self.needles) + sum(part.size for one in self.questions for part in one)


class SampleWriter(ABC):
    """Writes samples of a task with one tokenizer.

    Subclasses say what may be hidden and asked for (``drafts``), and what the least of it is.

    Args:
        tokenizer: Fast tokenizer.

    Attributes:
        vocabulary: Ids that answers consist of.
        prologue: Text before the haystack.
        closing: Text behind it.
        learns_questions: Whether labels stand on all behind the haystack, and not on the answers alone.
    """

    prologue: ClassVar[str]
    closing: ClassVar[str]
    vocabulary: Ids
    learns_questions: bool = False

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        beginning = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._prologue = np.concatenate([np.asarray(beginning, dtype=np.int64), self.ids(self.prologue)])
        self._closing = self.ids(self.closing)

    @abstractmethod
    def drafts(self, rng: np.random.Generator) -> Iterator[Draft]:
        """What a sample may hold, less and less of the same: the first draft that fits is written.

        Args:
            rng: Decides the words; all that is drawn from it is drawn before the first draft.
        """

    @abstractmethod
    def longest(self) -> Draft:
        """The least that a sample can hold, in the words that take the most tokens."""

    @property
    @abstractmethod
    def least(self) -> str:
        """What the least is and, behind a semicolon, what to do where it does not fit."""

    def ids(self, text: str) -> Ids:
        """Tokens of some words."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def sample(self, rng: np.random.Generator, haystack: Ids, length: int) -> Sample:
        """Write one sample.

        Args:
            rng: Decides words and depths.
            haystack: Tokens to hide needles in; repeated where there are too few.
            length: Tokens of the sample.

        Raises:
            ValueError: Not even the least that the task asks for fits.
        """
        draft = next((draft for draft in self.drafts(rng) if self._overhead(draft) <= length), None)
        if draft is None:
            self._refuse(length)
        pages = np.resize(haystack, length - self._overhead(draft))
        return self._write(draft, _hide(rng, pages, draft.needles))

    def require(self, length: int) -> None:
        """Make sure that samples of so many tokens hold what the task asks for, whatever its words.

        Raises:
            ValueError: Some would not.
        """
        if self._overhead(self.longest()) > length:
            self._refuse(length)

    def _refuse(self, length: int) -> NoReturn:
        raise ValueError(f"a sample of {length} tokens cannot hold {self.least}")

    def _overhead(self, draft: Draft) -> int:
        """Tokens of a sample beside the haystack's."""
        return self._prologue.size + self._closing.size + draft.size

    def _write(self, draft: Draft, pages: list[Ids]) -> Sample:
        parts = [self._prologue, *pages, self._closing]
        book = end = sum(part.size for part in parts)
        answers = []
        for one in draft.questions:
            start = end + one.question.size
            answers.append(slice(start, start + one.answer.size))
            parts += one
            end = answers[-1].stop + one.end.size
        input_ids = np.concatenate(parts)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for span in [slice(book, end)] if self.learns_questions else answers:
            labels[span] = input_ids[span]
        return Sample(input_ids, labels, book, answers, len(draft.needles))


class HaystackTask(Protocol):
    """Settings of such samples."""

    def writer(self, tokenizer: "PreTrainedTokenizerFast") -> SampleWriter:
        """Who writes them."""


def _hide(rng: np.random.Generator, haystack: Ids, needles: list[Ids]) -> list[Ids]:
    """The haystack in pieces, with a needle after each but the last."""
    depths = np.sort(rng.choice(_DEPTHS, size=len(needles), replace=False))
    pieces = np.split(haystack, (haystack.size * depths).astype(int))
    return [part for pair in zip(pieces, needles, strict=False) for part in pair] + pieces[-1:]
