"""Answers on their way: one queue for all engine requests that a request over HTTP makes."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvtrain.inference.engine import (
    Completion,
    Delta,
    Engine,
    EngineClosedError,
    Event,
    Finish,
    Request,
    TooLargeError,
    Usage,
)
from kvtrain.inference.server.metrics import ServerMetrics


@dataclass(frozen=True)
class Arrival:
    """An event of one of some answers.

    Attributes:
        index: Of the answer, counted over all requests.
        event: What happened.
    """

    index: int
    event: Event


@dataclass
class _Clock:
    """When an answer began, and went on."""

    began: float
    latest: float | None = None


class Answers:
    """Answers to some requests; when the task that asks for them ends, however it does, they are cancelled.

    Args:
        engine: Serves them.
        requests: Each with as many answers as it asks for.
        metrics: Are told how long tokens take.

    Raises:
        ValueError: And others, as ``Engine.submit``: then none is served.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: ServerMetrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self.num_answers = self._open = sum(request.n for request in requests)
        self._clocks = [_Clock(time.perf_counter()) for _ in range(self.num_answers)]
        self._parts: list[list[Delta]] = [[] for _ in range(self.num_answers)]
        self._whole: dict[int, Completion] = {}
        self._tickets, first = [], 0
        try:
            for request in requests:
                self._tickets.append(engine.submit(request, partial(self._take, first)))
                first += request.n
        except BaseException:
            self._cancel()
            raise
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._cancel())

    def __aiter__(self) -> AsyncIterator[Arrival]:
        return self

    async def __anext__(self) -> Arrival:
        if not self._open:
            raise StopAsyncIteration
        arrival = await self._arrivals.get()
        if isinstance(arrival.event, Delta):
            self._parts[arrival.index].append(arrival.event)
        else:
            self._open -= 1
            self._require_whole(arrival.event)
            self._whole[arrival.index] = Completion.of(self._parts[arrival.index], arrival.event)
        return arrival

    async def wait(self) -> None:
        """Wait for all to end.

        Raises:
            EngineClosedError: The engine ended before.
            TooLargeError: One outgrew the budget.
        """
        async for _ in self:
            pass

    def completions(self) -> list[Completion]:
        """Answers, when all have ended."""
        return [self._whole[index] for index in range(self.num_answers)]

    def usages(self) -> list[Usage]:
        """What each answer took, when all have ended."""
        return [completion.finish.usage for completion in self.completions()]

    def completion(self, index: int) -> Completion:
        """An answer that has ended."""
        return self._whole[index]

    def parts(self, index: int) -> list[Delta]:
        """Pieces of an answer so far."""
        return self._parts[index]

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def _take(self, first: int, event: Event) -> None:
        """An event of the request whose answers begin with this one; on the engine's thread."""
        index = first + event.index
        if isinstance(event, Delta) and event.token_ids:
            clock, now = self._clocks[index], time.perf_counter()
            if clock.latest is None:
                self._metrics.first_token.observe(now - clock.began)
            else:
                self._metrics.inter_token.observe(now - clock.latest)
            clock.latest = now
        self._loop.call_soon_threadsafe(self._arrivals.put_nowait, Arrival(index, event))

    def _require_whole(self, finish: Finish) -> None:
        if finish.reason != "error":
            return
        message = finish.error or "the answer failed"
        raise TooLargeError(message) if self._engine.health().ok else EngineClosedError(message)
