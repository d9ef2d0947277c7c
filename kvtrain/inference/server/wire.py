"""Requests in OpenAI's form: every field by its name, and none but these.

A field that only means something to OpenAI's own service is accepted and has no effect: ``user``, ``metadata``,
``store``, ``service_tier``, ``safety_identifier``, ``prompt_cache_key``. Fields that ask for what is not offered are
refused unless they ask for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from kvtrain.errors import UsageError
from kvtrain.inference.engine import Sampling

_MOST_STOPS = 16
_LONGEST_STOP = 256
_MOST_BIASES = 1024
_MOST_PROMPTS = 128
_MOST_MESSAGES = 4096
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "", "none", {"type": "text"})


def _refuse_not_offered(value: Any) -> None:
    if value not in _NEUTRAL:
        raise ValueError("this is not offered here; leave it out")


def _require_one(value: Any) -> None:
    if value not in (None, 1):
        raise ValueError("only 1 is offered here; ask for n answers instead")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    """Whether it is a string of whole characters: JSON can name halves of them."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """A list of prompts, each a text or token ids."""
    prompts = [value] if isinstance(value, str) or (_is_token_ids(value) and value) else value
    if not isinstance(prompts, list) or not all(_is_text(prompt) or _is_token_ids(prompt) for prompt in prompts):
        raise ValueError("give a text, a list of texts, token ids, or a list of lists of them, all of whole characters")
    if not prompts or not all(prompts):
        raise ValueError("it is empty; give at least one character or token")
    if len(prompts) > _MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts are more than {_MOST_PROMPTS}; send several requests")
    return prompts


def _content(value: Any) -> str:
    """Text of a message, whose parts may be given apart."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(_is_text_part(part) for part in parts):
        raise ValueError(
            'give a text of whole characters, or a list of {"type": "text", "text": ...}; others are not read'
        )
    return "".join(part["text"] for part in parts)


def _is_text_part(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"type", "text"}
        and value["type"] == "text"
        and _is_text(value["text"])
    )


NotOffered = Annotated[None, BeforeValidator(_refuse_not_offered)]
OnlyOne = Annotated[None, BeforeValidator(_require_one, json_schema_input_type=Literal[1] | None)]
Ignored = Annotated[Any, Field(description="Accepted, without an effect.")]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Stops = Annotated[
    Annotated[list[Stop], Field(max_length=_MOST_STOPS)],
    BeforeValidator(_as_list, json_schema_input_type=str | Annotated[list[Stop], Field(max_length=_MOST_STOPS)]),
]


class WireModel(BaseModel):
    """Refuses what it does not know, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(WireModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(WireModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart])]
    name: Ignored = None


class StreamOptions(WireModel):
    """How answers are streamed."""

    include_usage: bool | None = None


class GenerationFields(WireModel):
    """What completions and chats have in common; None, as OpenAI's client may send it, is the default."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], Field(max_length=_MOST_BIASES)] | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    ignore_eos: bool | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    def sampling(self) -> Sampling:
        """How tokens are chosen; by OpenAI's defaults, where a field is left out.

        Raises:
            ValueError: A token of ``logit_bias`` is no number.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        fields = {name: getattr(self, name) for name in (*names, "frequency_penalty", "seed")}
        given = {name: value for name, value in fields.items() if value is not None}
        return Sampling(**{"temperature": 1.0, **given, "logit_bias": self._biases()})

    def _biases(self) -> dict[int, float]:
        biases = self.logit_bias or {}
        if wrong := next((token for token in biases if not (token.isascii() and token.isdecimal())), None):
            raise UsageError(f"logit_bias: {wrong!r} is no token id; give whole numbers")
        return {int(token): bias for token, bias in biases.items()}

    @property
    def include_usage(self) -> bool:
        """Whether the last part of a stream says what was used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationFields):
    """The body of ``/v1/completions``."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0)
    echo: NotOffered = None
    suffix: NotOffered = None
    best_of: OnlyOne = None


class ChatRequest(GenerationFields):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: NotOffered = None
    tool_choice: NotOffered = None
    parallel_tool_calls: Ignored = None
    functions: NotOffered = None
    function_call: NotOffered = None
    response_format: NotOffered = None
    modalities: NotOffered = None
    audio: NotOffered = None
    prediction: NotOffered = None
    reasoning_effort: NotOffered = None
    verbosity: NotOffered = None
    web_search_options: NotOffered = None


FIELDS = frozenset([*CompletionRequest.model_fields, *ChatRequest.model_fields, "prompt", "stop"])
