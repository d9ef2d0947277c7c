"""The application: one function that uvicorn and Ray Serve take as it is."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from kvtrain.inference.engine import Engine
from kvtrain.inference.server.api import Api, api_routes
from kvtrain.inference.server.auth import RequireKey
from kvtrain.inference.server.errors import add_handlers
from kvtrain.inference.server.intake import Intake
from kvtrain.inference.server.live import page_routes
from kvtrain.inference.server.metrics import ServerMetrics
from kvtrain.inference.server.settings import ServerSettings


def build_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """A server over an engine, which the caller closes in the end.

    Args:
        engine: With a tokenizer.
        settings: Of the server.

    Raises:
        ValueError: The engine has no tokenizer.
    """
    app = FastAPI(title="kvtrain", version="1", docs_url=None, redoc_url=None)
    metrics = ServerMetrics(engine)
    app.add_middleware(Intake, settings=settings)  # the one that is added last stands before the others
    app.add_middleware(RequireKey, keys=settings.keys, allowed_hosts=settings.allowed_hosts)
    add_handlers(app)
    app.include_router(api_routes(Api(engine, settings, metrics)))
    app.include_router(page_routes(engine, settings))

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken: 200 or 503."""
        state = engine.health()
        return JSONResponse({"ok": state.ok, "reason": state.reason}, 200 if state.ok else 503)

    @app.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    return app
