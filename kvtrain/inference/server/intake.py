"""What stands before the routes: limits of size, time and number, and an ear for clients that hang up."""

import asyncio
import contextlib
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvtrain.inference.server.errors import RETRY_AFTER, ApiError
from kvtrain.inference.server.settings import ServerSettings

_SLACK = 30.0  # seconds that an answer may take to arrive once the engine has given it up
_OPEN_ENDED: Final = ("/live",)


class _HungUpError(Exception):
    """The client has left."""


class Intake:
    """Pure ASGI middleware that passes a body on as it comes and cancels the work when the client leaves.

    FastAPI's own limit of a body answers in plain text where the length is announced, so it is counted here.

    Args:
        app: What is behind it.
        settings: Limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 408, 413, 429 or 503."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self._open += 1
        try:
            self._require_room(scope)
            await self._serve(scope, receive, watched_send)
        except ApiError as error:
            if not started:  # else what there is must do
                await error.send(scope, receive, send)
        except _HungUpError:
            pass
        finally:
            self._open -= 1

    def _require_room(self, scope: Scope) -> None:
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()
        if self._open > self._settings.max_connections and scope["path"] != "/health":
            message = f"{self._settings.max_connections} requests are answered already; try again later"
            raise ApiError(429, message, None, "too_many_connections", RETRY_AFTER)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is above {self._settings.max_body_bytes:,} bytes; shorten it", None, "too_large"
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        work = asyncio.ensure_future(self._app(scope, messages.get, send))
        client = asyncio.ensure_future(self._listen(receive, messages))
        patience = None if scope["path"] in _OPEN_ENDED else self._settings.request_timeout + _SLACK
        try:
            done, _ = await asyncio.wait({work, client}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise ApiError(503, "the answer took too long; ask for less", None, "timeout", RETRY_AFTER)
            (work if work in done else client).result()
        finally:
            for task in (client, work):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _listen(self, receive: Receive, messages: asyncio.Queue[Message]) -> None:
        """Hand over what a client sends, and wait until it leaves.

        Raises:
            ApiError: It sends too much, or too slowly.
            _HungUpError: It has left.
        """
        size, seconds = 0, self._settings.body_timeout
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUpError
                    size += len(message.get("body", b""))
                    if size > self._settings.max_body_bytes:
                        raise self._too_large()
                    await messages.put(message)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            words = f"the request had not arrived after {seconds:g} seconds; send it at once"
            raise ApiError(408, words, None, "timeout", {"connection": "close"}) from None
        while (await receive())["type"] != "http.disconnect":
            pass
        raise _HungUpError
