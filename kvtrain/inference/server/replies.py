"""Answers in OpenAI's form, whole and in parts; usage says what the cache held, too."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from fastapi.sse import format_sse_event
from openai import BaseModel as OpenAIModel
from openai.types import Completion as TextCompletion
from openai.types import CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from kvtrain.inference.engine import Delta, Finish, TokenLogprob, Usage
from kvtrain.inference.server.generation import Answers

_Reply = TypeVar("_Reply", bound=OpenAIModel)
_UNFINISHED = "\ufffd"


class ReplyForm(ABC):
    """How answers to one request look.

    Args:
        model_name: As requests call it.
        tokenizer: Gives tokens their names.
        answers_per_prompt: Answers that share a prompt.
        logprobs: Whether they were asked for.
    """

    prefix: str

    def __init__(
        self, model_name: str, tokenizer: PreTrainedTokenizerFast, answers_per_prompt: int, logprobs: bool
    ) -> None:
        self._tokenizer, self._answers_per_prompt, self._logprobs = tokenizer, answers_per_prompt, logprobs
        self._around: dict[int, list[bytes]] = {}  # of each answer, what stands before and behind a piece of its text
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    @abstractmethod
    def whole(self, answers: Answers) -> BaseModel:
        """All answers at once, when they have ended."""

    @abstractmethod
    def first_chunks(self, num_answers: int) -> list[BaseModel]:
        """What a stream begins with."""

    @abstractmethod
    def delta(self, index: int, delta: Delta) -> BaseModel:
        """A piece of an answer."""

    @abstractmethod
    def finish(self, index: int, finish: Finish) -> BaseModel:
        """The end of an answer."""

    @abstractmethod
    def usage_chunk(self, usages: Sequence[Usage]) -> BaseModel:
        """What a stream ends with, where usage was asked for."""

    def delta_event(self, index: int, delta: Delta) -> bytes:
        """A piece of an answer as it is sent; all but its text is written once."""
        if delta.logprobs:
            return as_event(self.delta(index, delta))
        if index not in self._around:
            mark = uuid.uuid4().hex
            self._around[index] = as_event(self.delta(index, Delta(index, mark, ()))).split(f'"{mark}"'.encode())
        before, behind = self._around[index]
        return before + json.dumps(delta.text).encode() + behind

    def usage(self, usages: Sequence[Usage]) -> CompletionUsage:
        """What answers took, in OpenAI's words and in ours."""
        prompts = usages[:: self._answers_per_prompt]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        new_tokens = sum(usage.new_tokens for usage in usages)
        fields: dict[str, Any] = {"kvtrain": cache_facts(usages)}
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=new_tokens,
            total_tokens=prompt_tokens + new_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(u.cached_prompt_tokens for u in prompts)),
            **fields,
        )

    def token(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text and bytes; where it is no whole character, its name in the vocabulary and none."""
        backend = self._tokenizer.backend_tokenizer
        text = backend.decode([token_id], skip_special_tokens=False)
        return (backend.id_to_token(token_id) or text, None) if _UNFINISHED in text else (text, list(text.encode()))


def cache_facts(usages: Sequence[Usage]) -> dict[str, float]:
    """What the cache held for answers when they ended, added up."""
    seen, kept = sum(usage.seen_tokens for usage in usages), sum(usage.kept_tokens for usage in usages)
    return {
        "seen_tokens": seen,
        "kept_tokens": round(kept, 3),
        "compression": round(seen / kept, 4) if kept else 1.0,
        "held_bytes": sum(usage.held_bytes for usage in usages),
        "plain_bytes": sum(usage.plain_bytes for usage in usages),
        "preemptions": sum(usage.preemptions for usage in usages),
    }


def finish_reason(finish: Finish) -> Literal["stop", "length"]:
    """Why an answer ended: an end that is neither an end token nor a stop string left it short."""
    return "stop" if finish.reason == "stop" else "length"


def stop_reason(finish: Finish) -> str | None:
    """What OpenAI's words do not say: the stop string, or that time was up."""
    return finish.stop if finish.reason == "stop" else {"deadline": "deadline"}.get(finish.reason)


class TextForm(ReplyForm):
    """The form of ``/v1/completions``."""

    prefix = "cmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._shown: dict[int, int] = {}  # characters of each answer so far

    def whole(self, answers: Answers) -> TextCompletion:
        """All answers at once, when they have ended."""
        choices = []
        for index, completion in enumerate(answers.completions()):
            logprobs = _joined([self._token_logprobs(index, part) for part in answers.parts(index)])
            choices.append(self._choice(index, completion.text, logprobs, completion.finish))
        return self._completion(choices, self.usage(answers.usages()))

    def first_chunks(self, num_answers: int) -> list[BaseModel]:
        """Nothing."""
        return []

    def delta(self, index: int, delta: Delta) -> TextCompletion:
        """A piece of an answer."""
        return self._completion([self._choice(index, delta.text, self._token_logprobs(index, delta), None)])

    def finish(self, index: int, finish: Finish) -> TextCompletion:
        """The end of an answer."""
        return self._completion([self._choice(index, "", None, finish)])

    def usage_chunk(self, usages: Sequence[Usage]) -> TextCompletion:
        """Usage."""
        return self._completion([], self.usage(usages))

    def _completion(self, choices: list[CompletionChoice], usage: CompletionUsage | None = None) -> TextCompletion:
        return _constructed(TextCompletion, **self._head, object="text_completion", choices=choices, usage=usage)

    def _choice(self, index: int, text: str, logprobs: Logprobs | None, finish: Finish | None) -> CompletionChoice:
        reason: dict[str, Any] = {} if finish is None else {"stop_reason": stop_reason(finish)}
        ended = None if finish is None else finish_reason(finish)
        fields: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": ended}
        return _constructed(CompletionChoice, **fields, **reason)

    def _token_logprobs(self, index: int, delta: Delta) -> Logprobs | None:
        """Those of a piece of text, each at the place where the piece begins."""
        offset = self._shown.get(index, 0)
        self._shown[index] = offset + len(delta.text)
        if not self._logprobs:
            return None
        return Logprobs(
            tokens=[self.token(logprob.token_id)[0] for logprob in delta.logprobs],
            token_logprobs=[logprob.logprob for logprob in delta.logprobs],
            top_logprobs=[
                {self.token(token)[0]: value for token, value in logprob.alternatives} for logprob in delta.logprobs
            ],
            text_offset=[offset] * len(delta.logprobs),
        )


def _joined(parts: Sequence[Logprobs | None]) -> Logprobs | None:
    """Those of a whole answer."""
    fields = [part.model_dump() for part in parts if part is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    joined: dict[str, Any] = {name: [entry for part in fields for entry in part[name]] for name in names}
    return Logprobs(**joined) if fields else None


class ChatForm(ReplyForm):
    """The form of ``/v1/chat/completions``."""

    prefix = "chatcmpl"

    def whole(self, answers: Answers) -> ChatCompletion:
        """All answers at once, when they have ended."""
        choices = []
        for index, completion in enumerate(answers.completions()):
            fields: dict[str, Any] = {"stop_reason": stop_reason(completion.finish)}
            logprobs = self._token_logprobs(completion.logprobs, chat_completion.ChoiceLogprobs)
            message = ChatCompletionMessage(role="assistant", content=completion.text)
            reason = finish_reason(completion.finish)
            choice = chat_completion.Choice(
                index=index, message=message, finish_reason=reason, logprobs=logprobs, **fields
            )
            choices.append(choice)
        head: dict[str, Any] = {**self._head, "object": "chat.completion"}
        return ChatCompletion(**head, choices=choices, usage=self.usage(answers.usages()))

    def first_chunks(self, num_answers: int) -> list[BaseModel]:
        """Whose words follow."""
        role = {"role": "assistant", "content": ""}
        return [self._chunk([self._choice(index, role)]) for index in range(num_answers)]

    def delta(self, index: int, delta: Delta) -> ChatCompletionChunk:
        """A piece of an answer."""
        logprobs = self._token_logprobs(delta.logprobs, chat_completion_chunk.ChoiceLogprobs)
        return self._chunk([self._choice(index, {"content": delta.text}, logprobs)])

    def finish(self, index: int, finish: Finish) -> ChatCompletionChunk:
        """The end of an answer."""
        return self._chunk([self._choice(index, {}, None, finish)])

    def usage_chunk(self, usages: Sequence[Usage]) -> ChatCompletionChunk:
        """Usage."""
        return self._chunk([], self.usage(usages))

    def _chunk(
        self, choices: list[chat_completion_chunk.Choice], usage: CompletionUsage | None = None
    ) -> ChatCompletionChunk:
        return _constructed(
            ChatCompletionChunk, **self._head, object="chat.completion.chunk", choices=choices, usage=usage
        )

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: Finish | None = None
    ) -> chat_completion_chunk.Choice:
        reason: dict[str, Any] = {} if finish is None else {"stop_reason": stop_reason(finish)}
        ended = None if finish is None else finish_reason(finish)
        content = _constructed(chat_completion_chunk.ChoiceDelta, **delta)
        fields: dict[str, Any] = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": ended}
        return _constructed(chat_completion_chunk.Choice, **fields, **reason)

    def _token_logprobs(self, logprobs: Sequence[TokenLogprob], kind: Any) -> Any:
        return kind(content=[self._token_logprob(logprob) for logprob in logprobs]) if self._logprobs else None

    def _token_logprob(self, logprob: TokenLogprob) -> ChatCompletionTokenLogprob:
        (text, content), pairs = self.token(logprob.token_id), logprob.alternatives
        others = [(*self.token(token_id), value) for token_id, value in pairs]
        return ChatCompletionTokenLogprob(
            token=text,
            bytes=content,
            logprob=logprob.logprob,
            top_logprobs=[TopLogprob(token=token, bytes=encoded, logprob=value) for token, encoded, value in others],
        )


def _constructed(kind: type[_Reply], **fields: Any) -> _Reply:
    """A reply of fields that are right already; openai's own ``model_construct`` looks into each of them."""
    return super(OpenAIModel, kind).model_construct(**fields)


def as_json(reply: BaseModel) -> str:
    """A reply as it is sent: fields that nobody has set are left out."""
    return reply.model_dump_json(exclude_unset=True)


def as_event(reply: BaseModel) -> bytes:
    """A reply as a part of a stream."""
    return format_sse_event(data_str=as_json(reply))
