"""What is asked of an engine, and what it answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias

from kvtrain.errors import UsageError, require_at_least, require_seed

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "error"]

# OpenAI's own bounds; vLLM and transformers take them, too.
_MOST_TEMPERATURE = 2.0
_LEAST_TEMPERATURE = 0.01  # above 0; as in vLLM
_MOST_PENALTY = 2.0
_MOST_BIAS = 100.0


class TooLargeError(UsageError):
    """A request that can never be served here, however long it waits; the message has both figures."""


class QueueFullError(RuntimeError):
    """So many requests wait already that another one would wait too long; try again later."""


class EngineClosedError(RuntimeError):
    """The engine shuts down or has died; the message says why."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the best token, and so does less than 0.01: scores divided by so little overflow.
        top_p: Smallest nucleus of at least this probability.
        top_k: So many best tokens; 0 for all.
        min_p: Tokens of at least this share of the best one's probability.
        repetition_penalty: Divides positive scores of tokens that prompt or answer hold, and multiplies negative ones.
        presence_penalty: Subtracted from scores of tokens that the answer holds.
        frequency_penalty: The same, times how often the answer holds them.
        logit_bias: Added to scores, by token id.
        seed: The same seed gives the same text, whatever else is served meanwhile; None draws one.

    Raises:
        ValueError: A field is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_within("temperature", self.temperature, 0, _MOST_TEMPERATURE)
        _require_within("top_p", self.top_p, 0, 1)
        if not self.top_p:
            raise UsageError("top_p must be above 0; use temperature=0 for the best token alone")
        _require_whole("top_k", self.top_k)
        require_at_least(0, "top_k", self.top_k)
        _require_within("min_p", self.min_p, 0, 1)
        _require_within("repetition_penalty", self.repetition_penalty, 0.01, 10)
        _require_within("presence_penalty", self.presence_penalty, -_MOST_PENALTY, _MOST_PENALTY)
        _require_within("frequency_penalty", self.frequency_penalty, -_MOST_PENALTY, _MOST_PENALTY)
        for token, bias in self.logit_bias.items():
            _require_whole("logit_bias", token)
            _require_within(f"logit_bias of token {token}", bias, -_MOST_BIAS, _MOST_BIAS)
        if self.seed is not None:
            _require_whole("seed", self.seed)
            require_seed("seed", self.seed)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature < _LEAST_TEMPERATURE


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on with it.

    Args:
        prompt: Token ids, special ones included.
        max_new_tokens: Upper bound of each answer.
        sampling: How tokens are chosen.
        n: Answers, each with a generator of its own.
        stop: Strings that end an answer, which does not show them.
        eos_token_ids: Tokens that end an answer; None for the model's.
        ignore_eos: Go on behind such tokens.
        logprobs: How many alternatives each token comes with; 0 for its own log-probability alone, None for neither.
        timeout: Seconds from now on, waiting included, after which the answer ends as it is; None for no limit.

    Raises:
        ValueError: A field is out of range.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop: Sequence[str] = ()
    eos_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if isinstance(self.stop, str):
            raise UsageError(f"stop must be a list of strings; put {self.stop!r} into one")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not self.prompt:
            raise UsageError("prompt is empty; give at least one token, such as the tokenizer's start token")
        for name in ("max_new_tokens", "n", "logprobs"):
            if getattr(self, name) is not None:
                _require_whole(name, getattr(self, name))
        require_at_least(1, "max_new_tokens", self.max_new_tokens)
        require_at_least(1, "n", self.n)
        require_at_least(0, "logprobs", self.logprobs)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError("stop must hold strings of at least one character; leave empty ones out")
        if self.timeout is not None:
            _require_within("timeout", self.timeout, 0, math.inf)

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.prompt) + self.max_new_tokens


def _require_whole(name: str, number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool):
        raise UsageError(f"{name} must be a whole number, not {number!r}")


def _require_within(name: str, number: float, least: float, most: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UsageError(f"{name} must be a number, not {number!r}")
    if not (least <= number <= most and math.isfinite(number)):
        raise UsageError(f"{name} must lie between {least:g} and {most:g}, not {number}")


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model itself: before temperature, penalties and bias.

    Attributes:
        token_id: The token.
        logprob: Its natural logarithm.
        alternatives: The likeliest tokens at this place and theirs, the best first.
    """

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: Of the prompt.
        cached_prompt_tokens: Those of them that were not read, since a kept row held them.
        new_tokens: Generated, the end token included.
        seen_tokens: Tokens that the row has read: all but the last one, where all went well.
        kept_tokens: Entries that a head keeps of these, in the mean over layers and heads.
        held_bytes: Bytes that the row holds.
        plain_bytes: Bytes of its tokens in a cache that keeps every token in every head of every layer.
        preemptions: How often it had to make room for older requests.
    """

    prompt_tokens: int
    cached_prompt_tokens: int = 0
    new_tokens: int = 0
    seen_tokens: int = 0
    kept_tokens: float = 0.0
    held_bytes: int = 0
    plain_bytes: int = 0
    preemptions: int = 0

    @property
    def compression(self) -> float:
        """Tokens seen for each that is kept; 1 before anything has been read."""
        return self.seen_tokens / self.kept_tokens if self.kept_tokens else 1.0


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer.

    Attributes:
        index: Which of the ``n`` answers.
        text: What it adds; may be empty while a character, or what could be a stop string, is not whole.
        token_ids: Its tokens.
        logprobs: One a token, where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer; nothing of it follows.

    Attributes:
        index: Which of the ``n`` answers.
        reason: ``stop`` for an end token or a stop string, ``length`` for ``max_new_tokens``.
        usage: What it took.
        stop: The stop string that ended it.
        error: What went wrong, where the reason is ``error``.
    """

    index: int
    reason: FinishReason
    usage: Usage
    stop: str | None = None
    error: str | None = None


Event: TypeAlias = Delta | Finish


@dataclass(frozen=True)
class Completion:
    """One whole answer, as ``Engine.generate`` returns it.

    Attributes:
        text: All of it.
        token_ids: All of its tokens, the end token included.
        logprobs: One a token, where they were asked for.
        finish: How it ended.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish

    @classmethod
    def of(cls, parts: Sequence[Delta], finish: Finish) -> Self:
        """An answer of its pieces and its end."""
        return cls(
            text="".join(part.text for part in parts),
            token_ids=tuple(token for part in parts for token in part.token_ids),
            logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
            finish=finish,
        )
