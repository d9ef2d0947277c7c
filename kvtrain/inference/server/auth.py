"""Who may ask: a key on every route but ``/health``, and none of it by way of somebody else's web page."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvtrain.inference.server.errors import ApiError

_OPEN = ("/health",)


class RequireKey:
    """Pure ASGI middleware that asks for one of some keys, as a bearer token or as the password of a browser.

    Args:
        app: What is behind it.
        keys: Any of them opens; none of them leaves all open.
        allowed_hosts: Names that the Host header may have, without the port; None for any.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str], allowed_hosts: Collection[str] | None) -> None:
        self._app, self._allowed_hosts = app, allowed_hosts
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 400 or 401."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            error = self._wrong_host(headers)
            if error is None and scope["path"] not in _OPEN and not self._opens(headers):
                error = _unauthorized(headers)
            if error is not None:
                await error.send(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _opens(self, headers: Headers) -> bool:
        """Whether a key is right; takes the same time wherever it is wrong."""
        given = _digest(_given_key(headers))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # of all, whichever fits
        return not self._digests or any(matches)

    def _wrong_host(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.rpartition(":")[0] or host
        if self._allowed_hosts is None or name.lower() in self._allowed_hosts:
            return None
        names = ", ".join(sorted(self._allowed_hosts))
        return ApiError(400, f"without a key this server answers under {names} alone, not {name!r}", "host")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(key, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _unauthorized(headers: Headers) -> ApiError:
    given = "authorization" in headers
    message = "the key is wrong" if given else "a key is needed; send it as `Authorization: Bearer KEY`"
    browser = "text/html" in headers.get("accept", "")  # which then asks for a password: the key
    challenge = 'Basic realm="kvtrain: the key is the password"' if browser else "Bearer"
    return ApiError(401, message, None, "invalid_api_key", {"www-authenticate": challenge})
