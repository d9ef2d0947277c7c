"""The page at ``/`` and the facts that it shows: what the cache holds now, beside a plain one."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse

from kvtrain.inference.engine import Engine
from kvtrain.inference.server.metrics import tokens_per_second
from kvtrain.inference.server.settings import ServerSettings

_EVERY = 0.5  # seconds between two looks
_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def facts(engine: Engine) -> dict[str, Any]:
    """Figures of a moment, as the page reads them."""
    stats, health = engine.stats(), engine.health()
    running = stats.held_bytes - stats.kept_bytes
    names = ("queued", "running", "kept_prefixes", "held_bytes", "kept_bytes", "budget_bytes", "plain_bytes")
    return {
        **{name: value for name, value in asdict(stats).items() if name in (*names, "seen_tokens", "kept_tokens")},
        "running_bytes": running,
        "tokens_per_second": tokens_per_second(stats),
        "preemptions": stats.preemptions,
        "kept_share": stats.kept_share,
        "ok": health.ok,
        "reason": health.reason,
    }


def page_routes(engine: Engine, settings: ServerSettings) -> APIRouter:
    """The page, its two files, what it must know at first, and what it watches."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        router.add_api_route(path, _file_route(_FOLDER / name, media_type), methods=["GET"])

    @router.get("/page.json")
    async def about() -> dict[str, Any]:
        tokenizer = engine.tokenizer
        return {"model": settings.model_name, "chat": bool(tokenizer is not None and tokenizer.chat_template)}

    @router.get("/live", response_class=EventSourceResponse)
    async def live() -> AsyncIterator[dict[str, Any]]:
        while engine.health().ok:
            yield facts(engine)
            await asyncio.sleep(_EVERY)
        yield facts(engine)

    return router


def _file_route(path: Path, media_type: str) -> Any:
    content = path.read_bytes()

    async def show() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return show
