"""Samples of RULER's kinds of tasks (``ruler_kinds``) at any length."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvtrain.data.haystack import Draft, Ids, Sample, SampleWriter
from kvtrain.data.ruler_kinds import KINDS, NOISE, SEPARATOR
from kvtrain.errors import UsageError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_REMEMBERED = 1 << 16  # texts whose tokens a writer keeps


@dataclass(frozen=True)
class RulerTask:
    """One kind at one length.

    Args:
        kind: Its name, a key of ``KINDS``.
        length: Tokens of a sample, its answer included.

    Raises:
        ValueError: There is no such kind.
    """

    kind: str
    length: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(unknown("kind of ruler", self.kind, KINDS, f"There are {', '.join(KINDS)}"))

    def writer(self, tokenizer: "PreTrainedTokenizerFast") -> "RulerWriter":
        """Who writes samples of it."""
        return RulerWriter(tokenizer, self)


class RulerWriter(SampleWriter):
    """Writes samples of a task with one tokenizer; see ``SampleWriter``. A sample asks one question.

    Args:
        tokenizer: Fast tokenizer.
        task: The task.
    """

    prologue, closing = "", "\n\n"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", task: RulerTask) -> None:
        super().__init__(tokenizer)
        self.task, self.kind = task, KINDS[task.kind]
        self._encode = functools.lru_cache(_REMEMBERED)(self.ids)  # lists have many entries alike
        self._prologue = np.concatenate([self._prologue, self.ids(self.kind.prologue)])
        self._haystacks = {"noise": self.ids(NOISE), "blank": self.ids("\n")}
        self._room = task.length - self._prologue.size - self._closing.size
        self.vocabulary = np.unique(self.longest().questions[0].answer)

    def drafts(self, rng: np.random.Generator) -> Iterator[Draft]:
        """See ``SampleWriter``; one, which fills the length where the kind has no haystack."""
        yield self.kind.draft(self._encode, rng, self._room)

    def longest(self) -> Draft:
        """See ``SampleWriter``; of some that are drawn."""
        drafts = [self.kind.draft(self._encode, np.random.default_rng(seed), 0) for seed in range(8)]
        return max(drafts, key=lambda draft: draft.size)

    @property
    def least(self) -> str:
        """See ``SampleWriter``."""
        return f"{self.kind.least} of {self.task.kind}; raise the length"

    def sample(self, rng: np.random.Generator, haystack: Ids, length: int) -> Sample:
        """See ``SampleWriter``; kinds that have no text around their needles leave the haystack alone."""
        return super().sample(rng, self._haystacks.get(self.kind.haystack, haystack), length)

    def references(self, sample: Sample) -> list[str]:
        """What an answer to a sample must name."""
        return str(self.tokenizer.decode(sample.input_ids[sample.answers[0]])).strip().split(SEPARATOR)
