"""Keyed retrieval in RULER's kinds (arXiv 2404.06654, section 3): what names mean is hidden in a long text.

A name is an adjective and a noun, and means another name. Of RULER's tasks these are its needles in a haystack with one
key, with several keys of which one is asked for, and with several questions, and its variable tracking: a name that
means a second one, which means a third; the answer spells out both steps, as RULER's names every variable of a chain.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from kvtrain.data.haystack import Draft, Ids, Question, SampleWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["single", "multikey", "multiquery", "multihop"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Common words, each one token of kvtrain:tiny with the space before it, as of most vocabularies.
_ADJECTIVE_LIST = (
    "active clean clear custom different direct double empty exact global high last local long main multiple normal "
    "old public real right safe short simple single special standard static strict useful"
)
_NOUN_LIST = (
    "action address base block body button canvas case child client code color column command day document entry "
    "family field file font function group hand image item key label letter library line list lock map memory "
    "message month name object order pair path place point queue record screen server shape shell signal stack string "
    "table task thread token tree value version week window word year"
)
_ADJECTIVES, _NOUNS = _ADJECTIVE_LIST.split(), _NOUN_LIST.split()
_NUM_NAMES = len(_ADJECTIVES) * len(_NOUNS)
_MOST_KEYS = 200  # of a sample, which takes up to twice as many names

_PROLOGUE = "This text says what some names mean.\n\n"
_CLOSING = "\n\n"
_NEEDLE, _MEANS, _NEEDLE_END = "\n\nIn this text", " means", ".\n\n"
_QUESTION, _ONE_HOP, _TWO_HOPS, _AND, _END = "What does", " mean?", " mean in the end?", ", and", ".\n"


@dataclass(frozen=True)
class RetrievalTask:
    """How much is hidden, and what is asked.

    Args:
        keys: Names that a sample explains; those that nobody asks for are distractors. One in the kind ``single``. A
            sample too short for all of them explains as many as fit.
        questions: Most questions of a sample of a kind with several, ``multiquery`` and ``multihop``; no more than
            it has keys, or chains.
        kinds: How often each kind is drawn, as shares of their sum.

    Raises:
        ValueError: A value is out of range.
    """

    keys: int = 6
    questions: int = 3
    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))

    def __post_init__(self) -> None:
        if not 1 <= self.keys <= _MOST_KEYS:
            raise ValueError(f"keys must be from 1 to {_MOST_KEYS}, not {self.keys}")
        if self.questions < 1:
            raise ValueError(f"questions must be at least 1, not {self.questions}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no kind of retrieval; there are {', '.join(KINDS)}")
        if min(self.kinds.values(), default=0.0) < 0 or not 0 < sum(self.kinds.values()) < np.inf:
            raise ValueError(f"kinds must have shares, none negative and one of them above 0, of {', '.join(KINDS)}")
        if self.keys < 2 and self.kinds.get("multihop"):
            raise ValueError("a multihop chain takes two keys; set keys to 2 or more, or leave the kind out")

    def writer(self, tokenizer: "PreTrainedTokenizerFast") -> "RetrievalWriter":
        """Who writes samples of it."""
        return RetrievalWriter(tokenizer, self)


class RetrievalWriter(SampleWriter):
    """Writes samples of a task with one tokenizer; see ``SampleWriter``.

    Args:
        tokenizer: Fast tokenizer.
        task: The task.
    """

    prologue, closing = _PROLOGUE, _CLOSING

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", task: RetrievalTask) -> None:
        super().__init__(tokenizer)
        self.task = task
        self._adjectives, self._nouns = ([self.ids(f" {word}") for word in words] for words in (_ADJECTIVES, _NOUNS))
        self.vocabulary = np.unique(np.concatenate([*self._adjectives, *self._nouns]))
        frames = (_NEEDLE, _MEANS, _NEEDLE_END, _QUESTION, _ONE_HOP, _TWO_HOPS, _AND, _END)
        self._frames = {text: self.ids(text) for text in frames}
        shares = np.asarray([task.kinds.get(kind, 0.0) for kind in KINDS])
        self._shares = shares / shares.sum()

    def drafts(self, rng: np.random.Generator) -> Iterator[Draft]:
        """See ``SampleWriter``; the first keys stay."""
        kind = KINDS[rng.choice(len(KINDS), p=self._shares)]
        keys = 1 if kind == "single" else self.task.keys
        names = [self._name(int(number)) for number in rng.choice(_NUM_NAMES, size=2 * keys, replace=False)]
        places, asked = rng.permutation(keys), rng.permutation(keys)
        for count in range(keys, _fewest(kind) - 1, -1):
            yield self._draft(kind, names, places[places < count], asked[asked < count])

    def longest(self) -> Draft:
        """See ``SampleWriter``; of the kind that takes most."""
        name = np.concatenate([max(words, key=len) for words in (self._adjectives, self._nouns)])
        kinds = [kind for kind, share in zip(KINDS, self._shares, strict=True) if share]
        drafts = []
        for kind in kinds:
            keys = np.arange(_fewest(kind))
            drafts.append(self._draft(kind, [name] * 2 * len(keys), keys, keys))
        return max(drafts, key=lambda draft: draft.size)

    @property
    def least(self) -> str:
        """See ``SampleWriter``."""
        if self.task.kinds.get("multihop"):
            return "a chain of two names and its question; raise the length, or leave out the kind multihop"
        return "a name and its question; raise the length"

    def _name(self, number: int) -> Ids:
        adjective, noun = divmod(number, len(_NOUNS))
        return np.concatenate([self._adjectives[adjective], self._nouns[noun]])

    def _draft(self, kind: Kind, names: list[Ids], places: Ids, asked: Ids) -> Draft:
        """Keys are the first half of the names, values the second; key 2i of a chain means key 2i + 1.

        Args:
            kind: Of the sample.
            names: Two for each key that the task may hold.
            places: Keys of this draft as they stand in the text.
            asked: The same keys in the order in which questions are drawn.
        """
        count, hops = len(places), kind == "multihop"
        linked = [hops and key % 2 == 0 and key + 1 < count for key in range(count)]
        means = [names[key + 1] if linked[key] else names[len(names) // 2 + key] for key in range(count)]
        most = self.task.questions if kind in ("multiquery", "multihop") else 1
        chosen = [int(key) for key in asked if linked[key] or not hops][:most]
        return Draft(
            [self._join(_NEEDLE, names[key], _MEANS, means[key], _NEEDLE_END) for key in places],
            [self._ask(names[key], means[key], means[key + 1] if hops else None) for key in chosen],
        )

    def _ask(self, key: Ids, value: Ids, last: Ids | None) -> Question:
        question = self._join(_QUESTION, key, _ONE_HOP if last is None else _TWO_HOPS, key, _MEANS)
        answer = value if last is None else self._join(value, _AND, value, _MEANS, last)
        return Question(question, answer, self._frames[_END])

    def _join(self, *parts: str | Ids) -> Ids:
        return np.concatenate([self._frames[part] if isinstance(part, str) else part for part in parts])


def _fewest(kind: Kind) -> int:
    """Keys that a sample of a kind cannot do without."""
    return 2 if kind == "multihop" else 1
