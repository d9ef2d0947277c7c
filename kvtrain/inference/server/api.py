"""The routes of OpenAI's form."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from openai.types import Completion as TextCompletion
from openai.types import Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from kvtrain.errors import UsageError
from kvtrain.inference.engine import Engine, EngineClosedError, Finish, Request
from kvtrain.inference.prompt import prompt_ids
from kvtrain.inference.server.conversations import Conversations
from kvtrain.inference.server.errors import ApiError, refusal
from kvtrain.inference.server.generation import Answers, Arrival
from kvtrain.inference.server.metrics import ServerMetrics
from kvtrain.inference.server.replies import ChatForm, ReplyForm, TextForm, as_event, as_json
from kvtrain.inference.server.settings import ServerSettings
from kvtrain.inference.server.wire import ChatRequest, CompletionRequest, GenerationFields

_COMPLETION_TOKENS = 16  # OpenAI's default
_PING = 15.0  # seconds without an event after which a proxy may think that nobody is there
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_Ended = Callable[[int, Answers], None]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class Api:
    """Turns bodies into requests of an engine, and its answers into replies.

    Args:
        engine: With a tokenizer.
        settings: Of the server.
        metrics: Are told how long tokens take.

    Raises:
        ValueError: The engine has no tokenizer.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: ServerMetrics) -> None:
        if engine.tokenizer is None:
            raise UsageError("a server needs an engine with a tokenizer, which makes text of tokens")
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._tokenizer = engine.tokenizer
        self._conversations = Conversations(engine.tokenizer)

    def models(self) -> list[Model]:
        """The one model."""
        return [Model(id=self._settings.model_name, created=0, object="model", owned_by="kvtrain")]

    def model(self, name: str) -> Model:
        """The one model by its name.

        Raises:
            ApiError: It has another one.
        """
        if name != self._settings.model_name:
            raise self._unknown_model(name, 404)
        return self.models()[0]

    async def complete(self, body: CompletionRequest) -> Response:
        """Answer texts or tokens.

        Raises:
            ApiError: And others; the body asks for what is not served.
        """
        self._require_model(body)
        prompts = await self._prompts(body)
        tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        requests = [self._request(body, prompt, tokens, body.logprobs) for prompt in prompts]
        name, asked = self._settings.model_name, body.logprobs is not None
        form = TextForm(name, self._tokenizer, requests[0].n, asked)
        return await self._reply(body, requests, form)

    async def chat(self, body: ChatRequest) -> Response:
        """Answer a chat.

        Raises:
            ApiError: And others; the body asks for what is not served.
        """
        self._require_model(body)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if logprobs is None and body.top_logprobs:
            raise ApiError(400, "top_logprobs wants logprobs: true beside it", "top_logprobs")
        messages = [{"role": _role(message.role), "content": message.content} for message in body.messages]
        text = await asyncio.to_thread(self._conversations.text, messages)
        ids = await asyncio.to_thread(self._conversations.ids, text)
        request = self._request(body, ids, self._chat_tokens(body, len(ids)), logprobs)
        form = ChatForm(self._settings.model_name, self._tokenizer, request.n, logprobs is not None)

        def remember(index: int, answers: Answers) -> None:
            completion = answers.completion(index)
            finish, tokens = completion.finish, completion.token_ids
            if finish.stop is None and finish.reason in ("stop", "length"):
                said = tokens[:-1] if finish.reason == "stop" else tokens
                self._conversations.remember(text + completion.text, [*ids, *said])

        return await self._reply(body, [request], form, remember)

    def _require_model(self, body: GenerationFields) -> None:
        if body.model != self._settings.model_name:
            raise self._unknown_model(body.model, 400)

    def _unknown_model(self, name: str, status: int) -> ApiError:
        message = f"no model {name!r} is served here; ask for {self._settings.model_name!r}"
        return ApiError(status, message, "model", "model_not_found")

    async def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Token ids; texts, which may be long, become such beside the event loop."""

        def read() -> list[list[int]]:
            return [prompt_ids(self._tokenizer, p) if isinstance(p, str) else p for p in body.prompt]

        return await asyncio.to_thread(read) if any(isinstance(p, str) for p in body.prompt) else read()

    def _chat_tokens(self, body: ChatRequest, prompt_tokens: int) -> int:
        """As many as were asked for; else what is usual, or what limits leave of it."""
        given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if given is not None:
            return given
        usual, positions = self._settings.default_new_tokens, self._engine.max_positions
        left = usual if positions is None else max(1, positions - prompt_tokens)
        return min(usual, left, self._engine.limits.max_new_tokens or usual)

    def _request(self, body: GenerationFields, prompt: list[int], tokens: int, logprobs: int | None) -> Request:
        return Request(
            prompt,
            max_new_tokens=tokens,
            sampling=body.sampling(),
            n=1 if body.n is None else body.n,
            stop=body.stop or (),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            timeout=self._settings.request_timeout,
        )

    async def _reply(
        self, body: GenerationFields, requests: list[Request], form: ReplyForm, ended: _Ended | None = None
    ) -> Response:
        answers = Answers(self._engine, requests, self._metrics)
        if body.stream:
            events = _events(answers, form, body.include_usage, ended)
            return EventSourceResponse(events, headers=_STREAM_HEADERS)
        await answers.wait()
        if ended is not None:
            for index in range(answers.num_answers):
                ended(index, answers)
        return Response(as_json(form.whole(answers)), media_type="application/json")


def _role(role: str) -> str:
    return "system" if role == "developer" else role  # templates know the older word


async def _events(answers: Answers, form: ReplyForm, include_usage: bool, ended: _Ended | None) -> AsyncIterator[bytes]:
    """Parts of a body; what arrives together is sent together."""
    yield b"".join(as_event(reply) for reply in form.first_chunks(answers.num_answers))
    try:
        async for batch in answers.batches(_PING):
            if not batch:
                yield KEEPALIVE_COMMENT
            elif shown := b"".join(_shown(arrival, form) for arrival in batch):
                yield shown
            if ended is not None:
                for arrival in batch:
                    if isinstance(arrival.event, Finish):
                        ended(arrival.index, answers)
        last = as_event(form.usage_chunk(answers.usages())) if include_usage else b""
    except (UsageError, EngineClosedError) as error:  # the status is sent already
        last = format_sse_event(data_str=json.dumps(refusal(error).body()))
    yield last + format_sse_event(data_str="[DONE]")


def _shown(arrival: Arrival, form: ReplyForm) -> bytes:
    """What a client sees of an event: nothing of a token without text, such as half a character."""
    event = arrival.event
    if isinstance(event, Finish):
        return as_event(form.finish(arrival.index, event))
    return form.delta_event(arrival.index, event) if event.text or event.logprobs else b""


def api_routes(api: Api) -> APIRouter:
    """``/v1``."""
    refusals: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorBody, "description": "What is wrong with the request, in which field, and the remedy"},
        "5XX": {"model": ErrorBody, "description": "The server shuts down, or its engine has died"},
    }
    streams: dict[str, Any] = {"content": {"text/event-stream": {}}}
    router = APIRouter(prefix="/v1", responses=refusals)

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model.to_dict() for model in api.models()]}

    @router.get("/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """The model that is served, by its name."""
        return api.model(name).to_dict()

    @router.post("/completions", response_model=TextCompletion, responses={200: streams})
    async def complete(body: CompletionRequest) -> Response:
        """Go on from texts or token ids."""
        return await api.complete(body)

    @router.post("/chat/completions", response_model=ChatCompletion, responses={200: streams})
    async def chat(body: ChatRequest) -> Response:
        """Answer a chat."""
        return await api.chat(body)

    return router
