"""Requests and their answers on the engine's side."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from kvtrain.inference.engine.request import Delta, Event, FinishReason, Request, TokenLogprob, Usage
from kvtrain.inference.engine.sampling import Sampler
from kvtrain.inference.engine.sequence import ServedSequence
from kvtrain.inference.engine.text import TextStream

logger = logging.getLogger("kvtrain")


@dataclass(eq=False)
class Ticket:
    """A request that an engine has taken.

    Args:
        request: What is asked.
        deliver: Is given every event: it must be quick.
        event_loop: Where it is called; None is the engine's thread.

    Attributes:
        cancelled: Nobody wants the rest.
        usage: What running answers took some moments ago, by their index; for whoever watches.
        deadline: Time of the monotonic clock at which it ends as it is.
    """

    request: Request
    deliver: Callable[[Event], None]
    event_loop: asyncio.AbstractEventLoop | None = None
    cancelled: bool = False
    usage: dict[int, Usage] = field(default_factory=dict, init=False)
    deadline: float | None = field(init=False)

    def __post_init__(self) -> None:
        timeout = self.request.timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout

    def cancel(self) -> None:
        """Ask for no more, from any thread; what has ended stays as it is."""
        self.cancelled = True

    def send(self, event: Event) -> None:
        """Hand an event over, where it is to be taken; whoever fails to take one gets no more."""
        try:
            self.deliver(event)
        except Exception as error:
            self.lose(error)

    def lose(self, error: Exception) -> None:
        """Say that an event could not be handed over, and cancel; other requests go on."""
        if not self.cancelled:
            logger.warning("an answer could not be delivered, and its request is cancelled: %r", error)
        self.cancelled = True

    def ended(self, now: float) -> FinishReason | None:
        """Why it is over before its answers are."""
        if self.cancelled:
            return "cancelled"
        return "deadline" if self.deadline is not None and now >= self.deadline else None


class Outbox:
    """Events on their way; those of a step for one event loop cross to it together, since each crossing wakes it."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = {}

    def put(self, ticket: Ticket, event: Event) -> None:
        """Send an event: at once on the engine's thread, else when the outbox is flushed."""
        if ticket.event_loop is None:
            ticket.send(event)
        else:
            self._waiting.setdefault(ticket.event_loop, []).append((ticket, event))

    def flush(self) -> None:
        """Let what waits cross."""
        waiting, self._waiting = self._waiting, {}
        for event_loop, events in waiting.items():
            try:
                event_loop.call_soon_threadsafe(_send_all, events)
            except RuntimeError as error:  # it is closed
                for ticket, _ in events:
                    ticket.lose(error)


def _send_all(events: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.send(event)


class Answer:
    """One of the answers to a request.

    Args:
        ticket: Of the request.
        index: Which of its answers.
        arrival: Its number among all sequences of the engine.
        tokenizer: Makes text; without one there is none.
        eos_token_ids: End tokens of the model.
    """

    def __init__(
        self, ticket: Ticket, index: int, arrival: int, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int]
    ) -> None:
        request = ticket.request
        prompt = tuple(request.prompt)
        self.ticket, self.index = ticket, index
        self.sequence = ServedSequence(prompt, request.max_new_tokens, arrival)
        self.sampler = Sampler(request.sampling, prompt, self.sequence.output, index, request.logprobs)
        self.text = None if tokenizer is None else TextStream(tokenizer, request.stop)
        own = eos_token_ids if request.eos_token_ids is None else frozenset(request.eos_token_ids)
        self._ends = frozenset[int]() if request.ignore_eos else own

    @property
    def stop(self) -> str | None:
        """The stop string that has ended it."""
        return None if self.text is None else self.text.stop

    def push(self, token: int, logprob: TokenLogprob | None) -> tuple[Delta, FinishReason | None]:
        """Add a token: what it shows, and why the answer ends with it, if it does."""
        self.sequence.output.append(token)
        reason, text = self._reason(token), ""
        if self.text is not None:
            text = "" if token in self._ends else self.text.push(token)
            text += self.text.flush() if reason is not None else ""
            reason = "stop" if self.text.stop is not None else reason
        return Delta(self.index, text, (token,), () if logprob is None else (logprob,)), reason

    def _reason(self, token: int) -> FinishReason | None:
        if token in self._ends:
            return "stop"
        return "length" if len(self.sequence.output) >= self.sequence.max_new_tokens else None
