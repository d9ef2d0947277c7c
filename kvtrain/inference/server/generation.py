"""Answers on their way: one queue for all engine requests that a request over HTTP makes."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
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
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._arrivals: list[Arrival] = []  # since somebody looked
        self.num_answers = self._open = sum(request.n for request in requests)
        self._clocks = [_Clock(time.perf_counter()) for _ in range(self.num_answers)]
        self._parts: list[list[Delta]] = [[] for _ in range(self.num_answers)]
        self._whole: dict[int, Completion] = {}
        self._failure: Exception | None = None
        self._tickets, first, event_loop = [], 0, asyncio.get_running_loop()
        try:
            for request in requests:
                self._tickets.append(engine.submit(request, partial(self._take, first), event_loop))
                first += request.n
        except BaseException:
            self._cancel()
            raise
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._cancel())

    async def batches(self, patience: float) -> AsyncGenerator[list[Arrival]]:
        """What has arrived since the last batch, until all have ended.

        Args:
            patience: Seconds without an event after which there is an empty batch.

        Raises:
            EngineClosedError: The engine ended before.
            TooLargeError: One outgrew the budget.
        """
        alarm = _Alarm(patience, self._news)
        try:
            while self._arrivals or not self._over.is_set():
                await self._news.wait()
                self._news.clear()
                arrivals, self._arrivals = self._arrivals, []
                if arrivals or not self._over.is_set():
                    yield arrivals
                alarm.put_off()
        finally:
            alarm.cancel()
        if self._failure is not None:
            raise self._failure

    async def wait(self) -> None:
        """Wait for all to end.

        Raises:
            EngineClosedError: The engine ended before.
            TooLargeError: One outgrew the budget.
        """
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

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
        """An event of the request whose answers begin with this one."""
        if self._over.is_set():  # by a failure
            return
        index = first + event.index
        if isinstance(event, Delta):
            self._parts[index].append(event)
            self._observe(self._clocks[index])
        else:
            self._open -= 1
            self._failure = self._failure_of(event)
            self._whole[index] = Completion.of(self._parts[index], event)
        if self._failure is None:
            self._arrivals.append(Arrival(index, event))
        if self._failure is not None or not self._open:
            self._over.set()
        self._news.set()

    def _observe(self, clock: _Clock) -> None:
        """Note when a token of an answer came."""
        now = time.perf_counter()
        if clock.latest is None:
            self._metrics.first_token.observe(now - clock.began)
        else:
            self._metrics.inter_token.observe(now - clock.latest)
        clock.latest = now

    def _failure_of(self, finish: Finish) -> Exception | None:
        if finish.reason != "error":
            return None
        message = finish.error or "the answer failed"
        return TooLargeError(message) if self._engine.health().ok else EngineClosedError(message)


class _Alarm:
    """Sets an event where it has not been put off for some time; one timer, since one a token costs more than the rest.

    Args:
        seconds: Between two alarms, or the latest event and an alarm.
        event: Is set.
    """

    def __init__(self, seconds: float, event: asyncio.Event) -> None:
        self._seconds, self._event, self._loop = seconds, event, asyncio.get_running_loop()
        self.put_off()
        self._timer = self._loop.call_later(seconds, self._look)

    def put_off(self) -> None:
        """Begin anew."""
        self._since = self._loop.time()

    def cancel(self) -> None:
        """No more alarms."""
        self._timer.cancel()

    def _look(self) -> None:
        left = self._since + self._seconds - self._loop.time()
        if left <= 0:
            self._event.set()
            left = self._seconds
        self._timer = self._loop.call_later(left, self._look)
