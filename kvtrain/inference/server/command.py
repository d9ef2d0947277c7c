"""``kvtrain serve``: everything that can be wrong is said before the model is read, and signals end it in order."""

import asyncio
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtrain.errors import UsageError, require_at_least
from kvtrain.parser import Parser, finite, num_bytes
from kvtrain.stop_signals import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kvtrain.inference.engine import Engine
    from kvtrain.inference.server.settings import ServerSettings

API_KEY = "KVTRAIN_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")
_SHORTEST_KEY = 16
_KEEP_ALIVE = 75  # seconds: longer than clients and proxies keep an idle connection, or they find it closed under them
_LINGER = 5  # seconds for connections once all requests have ended


def add_arguments(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="exported folder, Hub id or kvtrain:tiny")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; any but this machine's own needs a key (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (8000)")
    parser.add_argument("--name", help="what requests call the model (MODEL, of a folder its last part)")
    parser.add_argument(
        "--budget", type=num_bytes, default=num_bytes("1GiB"), metavar="SIZE", help="bytes of cache (1GiB)"
    )
    parser.add_argument("--max-requests", type=int, default=64, metavar="N", help="answers written at a time (64)")
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="answers that may wait (1024)")
    parser.add_argument("--max-prompt-tokens", type=int, default=32768, metavar="N", help="of a request (32768)")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="of an answer (4096)")
    parser.add_argument("--timeout", type=finite, default=600.0, metavar="S", help="seconds for an answer (600)")
    parser.add_argument("--grace", type=finite, default=30.0, metavar="S", help="seconds to end in when stopped (30)")
    parser.add_argument("--api-key-file", metavar="FILE", help="keys that open the server, one a line")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's")
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
    _require_packages()
    _require_numbers(asked)
    keys = _read_keys(asked.api_key_file)
    template = _read_template(asked.chat_template)
    with _bind(asked.host, asked.port, bool(keys)) as listener:
        engine = _open_engine(asked, template)
        settings = _settings(asked, keys, listener)
        address = _shown(listener)
        print(
            f"kvtrain: {settings.model_name} at {address}, {'a key opens it' if keys else 'open to this machine'}",
            flush=True,
        )
        raise SystemExit(asyncio.run(_serve(engine, settings, listener, asked.grace)))


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serving needs {', '.join(missing)}; pip install 'kvtrain[serve]'")


def _require_numbers(asked: Namespace) -> None:
    if not 0 <= asked.port < 1 << 16:
        raise UsageError(f"--port must be from 0 to {(1 << 16) - 1}, not {asked.port}")
    for name in ("max_requests", "max_queue", "max_prompt_tokens", "max_tokens"):
        require_at_least(1, f"--{name.replace('_', '-')}", getattr(asked, name))
    if asked.timeout <= 0:
        raise UsageError(f"--timeout must be above 0, not {asked.timeout}")
    require_at_least(0, "--grace", asked.grace)


def _read_keys(path: str | None) -> tuple[str, ...]:
    """Keys of a file, or of the environment; never shown, in no message either."""
    given = os.environ.get(API_KEY, "") if path is None else Path(path).read_bytes().decode("utf-8", "replace")
    keys = tuple(line.strip() for line in given.splitlines() if line.strip())
    where = API_KEY if path is None else path
    if path is not None and not keys:
        raise UsageError(f"{where} holds no key; write one a line")
    if any(len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise UsageError(
            f"{where}: a key must have at least {_SHORTEST_KEY} ASCII characters; `openssl rand -hex 32` makes one"
        )
    return keys


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        template = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text, so no chat template") from error
    if not template.strip():
        raise UsageError(f"{path} is empty; write a chat template into it, or leave --chat-template out")
    return template


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


def _open_engine(asked: Namespace, template: str | None) -> "Engine":
    from kvtrain.inference.engine import Engine, Limits
    from kvtrain.inference.load import open_model

    model, tokenizer = open_model(asked.model)
    if template is not None:
        _set_template(tokenizer, template, asked.chat_template)
    limits = Limits(
        max_requests=asked.max_requests,
        max_queue=asked.max_queue,
        max_prompt_tokens=asked.max_prompt_tokens,
        max_new_tokens=asked.max_tokens,
        step_tokens=max(512, 2 * asked.max_requests),
    )
    return Engine(model, tokenizer, asked.budget, limits)


def _set_template(tokenizer: "PreTrainedTokenizerFast", template: str, path: str) -> None:
    """Give a tokenizer a chat template, once it has been tried."""
    from jinja2 import TemplateError

    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(f"{path} is no chat template that works: {' '.join(str(error).split())}") from error


def _settings(asked: Namespace, keys: tuple[str, ...], listener: socket.socket) -> "ServerSettings":
    from kvtrain.inference.server.settings import ServerSettings

    folder = Path(asked.model)
    name = asked.name or (folder.resolve().name if folder.is_dir() else asked.model)
    host = listener.getsockname()[0]
    local = frozenset(["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, asked.host.lower()])
    return ServerSettings(
        name,
        keys,
        None if keys else local,
        max_connections=max(1024, 2 * asked.max_queue),
        request_timeout=asked.timeout,
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
