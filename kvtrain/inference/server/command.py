"""``kvtrain serve``: everything that can be wrong is said before the model is read, and signals end it in order."""

import asyncio
import ipaddress
import os
import signal
import socket
import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from kvtrain.errors import UsageError, require_at_least
from kvtrain.inference.server.options import API_KEY, ServeOptions, add_engine_arguments
from kvtrain.parser import Parser, finite
from kvtrain.stop_signals import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE

if TYPE_CHECKING:
    from kvtrain.inference.engine import Engine
    from kvtrain.inference.server.settings import ServerSettings

_KEEP_ALIVE = 75  # seconds: longer than clients and proxies keep an idle connection, or they find it closed under them
_LINGER = 5  # seconds for connections once all requests have ended


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    add_engine_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; any but this machine's own needs a key (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (8000)")
    parser.add_argument("--grace", type=finite, default=30.0, metavar="S", help="seconds to end in when stopped (30)")
    parser.epilog = (
        f"A key can also stand in the environment, as {API_KEY}. The routes are OpenAI's: /v1/models, /v1/completions, "
        "/v1/chat/completions; besides /health, /metrics, and a page at /."
    )


def run(asked: Namespace) -> None:
    """Serve until a signal comes.

    Raises:
        ValueError: Something about the command line is wrong, or the model.
        SystemExit: With 143 or 130, after a signal.
    """
    options = ServeOptions.read(asked)
    if not 0 <= asked.port < 1 << 16:
        raise UsageError(f"--port must be from 0 to {(1 << 16) - 1}, not {asked.port}")
    require_at_least(0, "--grace", asked.grace)
    with _bind(asked.host, asked.port, bool(options.keys)) as listener:
        engine = options.open_engine()
        settings = options.settings(max(1024, 2 * asked.max_queue), _allowed_hosts(options, listener))
        address = _shown(listener)
        openness = "a key opens it" if options.keys else "open to this machine"
        print(f"kvtrain: {settings.model_name} at {address}, {openness}", flush=True)
        raise SystemExit(asyncio.run(_serve(engine, settings, listener, asked.grace)))


def _bind(host: str, port: int, has_key: bool) -> socket.socket:
    """A socket at an address, before anything heavy is loaded; nobody can connect yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address of this machine; try 127.0.0.1") from error
    if not has_key and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UsageError(f"--host {host} is open to others, which needs a key: --api-key-file FILE or {API_KEY}")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{host} port {port} cannot be had ({error.strerror}); choose another --port or --host"
        ) from error
    return listener


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allowed_hosts(options: ServeOptions, listener: socket.socket) -> frozenset[str] | None:
    """Under which names browsers may call a server that no key protects."""
    if options.keys:
        return None
    host = listener.getsockname()[0]
    return frozenset(
        ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, options.asked.host.lower()]
    )


def _say(line: str) -> None:
    """A line for whoever still reads it: a signal ends the server also where nobody does."""
    with suppress(OSError):
        print(f"kvtrain: {line}", file=sys.stderr, flush=True)


async def _serve(engine: "Engine", settings: "ServerSettings", listener: socket.socket, grace: float) -> int:
    """Serve on a socket until a signal comes; the exit code."""
    import uvicorn

    from kvtrain.inference.server.app import build_app

    class Server(uvicorn.Server):
        """Leaves signals to us."""

        def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
            return nullcontext()

    app: Any = build_app(engine, settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LINGER,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE,
    )
    server, codes = Server(config), list[int]()

    async def stop() -> None:
        await asyncio.to_thread(engine.close, grace)
        server.should_exit = True

    def hear(number: signal.Signals) -> None:
        code = INTERRUPTED_EXIT_CODE if number == signal.SIGINT else STOPPED_EXIT_CODE
        if codes:
            _say(f"{number.name} after another signal: leaving at once")
            os._exit(code)
        codes.append(code)
        stopping.append(loop.create_task(stop()))
        _say(f"{number.name}: no new requests, running ones have {grace:g} seconds")

    loop, stopping = asyncio.get_running_loop(), list[asyncio.Task[None]]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear, number)
    try:
        await server.serve(sockets=[listener])
    finally:
        await asyncio.to_thread(engine.close)
    return codes[0] if codes else 0
