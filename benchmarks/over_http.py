"""The same requests to an engine and to a server over it, in a process of their own whose CPU time is all that counts.

Clients live in the process that calls, which is none of the server's.
"""

import asyncio
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httpx
import torch
import uvicorn
from contenders import make_model
from latency import Latencies, watch

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.inference.engine import Engine, Request
from kvtrain.inference.server.app import build_app
from kvtrain.inference.server.settings import ServerSettings

NAME = "measured"


@dataclass(frozen=True)
class Visit:
    """One run of all requests.

    Attributes:
        latencies: By the clock on the wall.
        seconds: CPU time of the process of the engine.
    """

    latencies: Latencies
    seconds: float


class Measured:
    """An engine in a process of its own, which can be asked by itself and over HTTP.

    Args:
        method: Of ``contenders.METHODS``.
        budget: Bytes of its cache.
    """

    def __init__(self, method: str, budget: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_live, args=(theirs, method, budget), daemon=True)
        self._process.start()
        self._url: str = self._pipe.recv()

    def alone(self, requests: Sequence[Request], gap: float) -> Visit:
        """Ask the engine, in its own process."""
        self._pipe.send((requests, gap))
        latencies: Latencies = self._pipe.recv()
        return Visit(latencies, self._pipe.recv())

    def over_http(self, requests: Sequence[Request], gap: float) -> Visit:
        """Ask the server, from this process."""
        self._pipe.send(None)
        latencies = asyncio.run(_visit(self._url, requests, gap))
        self._pipe.send(None)
        return Visit(latencies, self._pipe.recv())

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _live(pipe: Connection, method: str, budget: int) -> None:
    """What the process does: runs, each between two looks at its clock, until it is ended."""
    torch.set_num_threads(1)
    engine = Engine(make_model(method), load_tokenizer("kvtrain:tiny"), budget)
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            build_app(engine, ServerSettings(NAME)), log_level="warning", access_log=False, lifespan="off"
        )
        threading.Thread(target=uvicorn.Server(config).run, args=([listener],), daemon=True).start()
        pipe.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
        while True:
            asked: Any = pipe.recv()
            began = time.process_time()
            if asked is not None:
                pipe.send(watch(engine.submit, *asked))
            else:
                pipe.recv()
            pipe.send(time.process_time() - began)
            engine.drop_kept_prefixes()


async def _visit(url: str, requests: Sequence[Request], gap: float) -> Latencies:
    """Streams of all requests, with a gap between their beginnings."""
    result, began = Latencies(), time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:

        async def come(number: int, request: Request) -> None:
            await asyncio.sleep(max(0.0, began + number * gap - time.perf_counter()))
            await _read(client, request, result)

        await asyncio.gather(*(come(number, request) for number, request in enumerate(requests)))
    result.seconds = time.perf_counter() - began
    return result


async def _read(client: httpx.AsyncClient, request: Request, result: Latencies) -> None:
    """One stream; a token that adds no text, such as half a character, is seen with the next one.

    Raises:
        RuntimeError: The answer did not end as it should.
    """
    body = {"model": NAME, "prompt": request.prompt, "max_tokens": request.max_new_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True}
    latest, ended, first = time.perf_counter(), False, True
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,), now = json.loads(line.removeprefix("data: "))["choices"], time.perf_counter()
            ended = choice["finish_reason"] == "length"
            if not ended:
                (result.first if first else result.between).append(now - latest)
                latest, first = now, False
    if not ended:
        raise RuntimeError(f"an answer over HTTP is not whole: {reply.status_code}")
