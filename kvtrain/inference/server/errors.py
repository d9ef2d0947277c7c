"""Refusals in OpenAI's form: what is wrong, in which field, and what helps."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from kvtrain.errors import UsageError, unknown
from kvtrain.inference.engine import EngineClosedError, QueueFullError, TooLargeError
from kvtrain.inference.server.wire import FIELDS

logger = logging.getLogger("kvtrain")
RETRY_AFTER = {"retry-after": "1"}
_LONGEST = 500  # characters of a message: it may quote what a client sent
_TYPES = {401: "authentication_error", 413: "request_too_large", 429: "rate_limit_error"}
# The engine's words for fields that OpenAI names otherwise.
_WIRE_NAMES = {"max_new_tokens": "max_tokens", "timeout": "request_timeout"}


class ApiError(Exception):
    """A refusal.

    Args:
        status: Of HTTP.
        message: What is wrong, and the remedy.
        param: The field.
        code: A word for programs.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = str(self)
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer; escaped, since what it quotes may be no text."""
        return Response(json.dumps(self.body()), self.status, self.headers, media_type="application/json")

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request before it reaches a route."""
        await self.response()(scope, receive, send)


def refusal(error: Exception) -> ApiError:
    """What an engine's refusal is for a client."""
    message = str(error)
    for ours, theirs in _WIRE_NAMES.items():
        message = message.replace(ours, theirs)
    word = message.split(" ", 1)[0].rstrip(":")
    param = word if word in FIELDS else None
    if isinstance(error, TooLargeError):
        return ApiError(413, message, param, "context_length_exceeded")
    if isinstance(error, QueueFullError):
        return ApiError(429, message, None, "queue_full", RETRY_AFTER)
    if isinstance(error, EngineClosedError):
        return ApiError(503, message, None, "unavailable", RETRY_AFTER)
    return ApiError(400, message, param)


def explain(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, by its first mistake."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    kind, param = first["type"], ".".join(where) or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if kind == "extra_forbidden":
        return ApiError(400, unknown("field", where[-1], FIELDS, "See /openapi.json"), param, "unknown_field")
    if kind == "missing" and where:
        return ApiError(400, f"{param} is missing", param, "missing_field")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent with content-type application/json")
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Give every error of an application OpenAI's form."""

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def refuse_by_engine(_: Request, error: Exception) -> Response:
        return refusal(error).response()

    async def refuse_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return explain(error).response()

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: f"no route {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        message = words.get(error.status_code, "the body cannot be read: it is no JSON, or nested too deeply")
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def apologize(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "an error of the server; its log has the rest").response()

    app.add_exception_handler(ApiError, refuse)
    for kind in (UsageError, QueueFullError, EngineClosedError):
        app.add_exception_handler(kind, refuse_by_engine)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, apologize)
