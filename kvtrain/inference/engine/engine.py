"""The engine: one thread owns the model; requests go in and events come out by queues."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from kvtrain.errors import first_line
from kvtrain.inference.engine.answers import Ticket
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.loop import EngineLoop
from kvtrain.inference.engine.request import Completion, Delta, EngineClosedError, Event, QueueFullError, Request, Usage
from kvtrain.inference.engine.stats import EngineStats, Health

logger = logging.getLogger("kvtrain")
_Command = Callable[[EngineLoop], None]


class Engine:
    """Serves a model with its matching cache to many requests at a time, within a budget of bytes.

    Requests share every step: each running one goes on by a token, and prompts are read beside them. Which run, wait
    or make room follows from the bytes that rows are seen to take.

    Args:
        model: With a cache of its own kind: from ``open_model`` or ``retrofit``. It belongs to the engine's thread from
            now on, in evaluation mode.
        tokenizer: Makes text of tokens; without one, events have none.
        budget: Bytes of the cache; kept prefixes count, and go when they are in the way.
        limits: How much it takes on.

    Attributes:
        tokenizer: As given.

    Raises:
        ValueError: The model has no cache, or the budget does not hold a token.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerFast | None, budget: int, limits: Limits | None = None
    ) -> None:
        self.limits, self.tokenizer = limits or Limits(), tokenizer
        backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._loop = EngineLoop(model, backend, budget, self.limits)
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between taking a request and refusing all
        self._pending = 0  # answers that the thread has not taken yet
        self._refusal: str | None = None  # why no request is taken any more
        self._grace_ends: float | None = None
        self._thread = threading.Thread(target=self._serve, name="kvtrain-engine", daemon=True)
        self._thread.start()

    @property
    def max_positions(self) -> int | None:
        """Tokens that a row of the model may come to; None where that has no end."""
        return self._loop.max_positions

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def submit(
        self, request: Request, deliver: Callable[[Event], None], event_loop: asyncio.AbstractEventLoop | None = None
    ) -> Ticket:
        """Take a request; each of its answers ends with a ``Finish``.

        Args:
            request: What is asked.
            deliver: Is given every event: it must be quick, and may not wait.
            event_loop: Where it is called, once all that a pass over the model gives is there; None is the engine's
                thread, at once.

        Returns:
            What cancels it, at any time and from any thread.

        Raises:
            ValueError: A field is out of the model's or the engine's range.
            TooLargeError: It can never be served here.
            QueueFullError: Too many wait.
            EngineClosedError: The engine shuts down or has died.
        """
        self._loop.check(request)
        ticket = Ticket(request, deliver, event_loop)
        with self._lock:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            waiting = len(self._loop.scheduler.queue) + self._pending
            if waiting + request.n > self.limits.max_queue:
                raise QueueFullError(f"{waiting} answers wait already, of {self.limits.max_queue}; try again later")
            self._pending += request.n
            self._commands.put(lambda loop: self._take(loop, ticket))
        return ticket

    def stream(self, request: Request) -> "EventStream":
        """Events of a request as they come, for ``async for``; whoever leaves cancels it.

        Raises:
            ValueError: And others, as ``submit``; at once, before anything is waited for.
        """
        return EventStream(self, request)

    def generate(self, request: Request) -> list[Completion]:
        """Whole answers, when all are there; blocks.

        Raises:
            ValueError: And others, as ``submit``.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.submit(request, events.put)
        parts: list[list[Delta]] = [[] for _ in range(request.n)]
        answers: dict[int, Completion] = {}
        try:
            while len(answers) < request.n:
                event = events.get()
                if isinstance(event, Delta):
                    parts[event.index].append(event)
                else:
                    answers[event.index] = Completion.of(parts[event.index], event)
        finally:
            ticket.cancel()
        return [answers[index] for index in range(request.n)]

    def health(self) -> Health:
        """Whether requests are taken."""
        return Health(self._refusal is None, self._refusal)

    def stats(self) -> EngineStats:
        """Figures of a moment ago; costs nothing."""
        return self._loop.meter.stats

    def drop_kept_prefixes(self) -> None:
        """Give back what is kept for prompts to come; returns when it is done, at once where the engine has ended."""
        done = threading.Event()

        def drop(loop: EngineLoop) -> None:
            try:
                loop.drop_kept_prefixes()
            finally:
                done.set()

        self._commands.put(drop)
        while not done.wait(0.1) and self._thread.is_alive():
            pass

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, let running and waiting ones end, and stop the thread.

        Args:
            grace: Seconds, after which those that have not ended fail with that reason.
        """
        with self._lock:
            self._refusal = self._refusal or "the engine shuts down"
            ends = time.monotonic() + grace
            self._grace_ends = ends if self._grace_ends is None else min(ends, self._grace_ends)
            self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _take(self, loop: EngineLoop, ticket: Ticket) -> None:
        with self._lock:
            self._pending -= ticket.request.n
        loop.submit(ticket)

    def _serve(self) -> None:
        """The thread: it ends when the engine is closed, or with the first error that is not a request's own."""
        loop = self._loop
        try:
            while self._run_commands(loop):
                loop.step()
            reason = "the engine shut down before the answer was complete"
        except BaseException as error:  # whatever it is, nobody may wait for an answer in vain
            logger.exception("the engine has died")
            reason = f"the engine has died of {type(error).__name__}: {first_line(error)}"
        with self._lock:
            self._refusal = reason if self._refusal is None else self._refusal
        loop.fail(reason)
        self._fail_commands(loop, reason)

    def _run_commands(self, loop: EngineLoop) -> bool:
        """Do what other threads ask for, and wait for that while there is nothing else to do; whether to go on."""
        while True:
            if self._grace_ends is not None and time.monotonic() >= self._grace_ends:
                return False
            try:
                command = self._commands.get(block=not loop.busy and self._grace_ends is None)
            except queue.Empty:
                return loop.busy or self._grace_ends is None
            if command is not None:
                command(loop)

    def _fail_commands(self, loop: EngineLoop, reason: str) -> None:
        """End requests that were on their way when the thread ended."""
        while True:
            try:
                command = self._commands.get(block=False)
                if command is not None:
                    command(loop)
            except queue.Empty:
                return
            except Exception:  # after a death the cache may be in any state
                logger.exception("the engine has ended, and so has what was asked of it")
            loop.fail(reason)


class EventStream:
    """Events of a request, on the event loop that asks for them; see ``Engine.stream``."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._events, self._open = asyncio.Queue[Event](), request.n  # answers that have not ended
        # The queue knows nothing of this object: when nobody holds it any more, it cancels.
        self._ticket = engine.submit(request, self._events.put_nowait, asyncio.get_running_loop())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._open:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._open -= not isinstance(event, Delta)
        return event

    @property
    def usage(self) -> Mapping[int, Usage]:
        """What running answers took some moments ago, by their index."""
        return self._ticket.usage

    def cancel(self) -> None:
        """Ask for no more; answers that are not whole end with reason ``cancelled``."""
        self._ticket.cancel()

    async def aclose(self) -> None:
        """Leave."""
        self._open = 0
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_ticket"):
            self.cancel()
