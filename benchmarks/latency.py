"""How long readers wait: requests that come one after another, by the clock on the wall."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvtrain.inference.engine import Delta, Event, Request

Submit = Callable[[Request, Callable[[Event], None]], object]


@dataclass
class Latencies:
    """Seconds until first tokens, and between a token and the next.

    Attributes:
        first: One a request.
        between: One for every further token.
        seconds: Of the whole run.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> str:
        """Percentiles in milliseconds."""
        named = {"first token": self.first, "between tokens": self.between}
        return "\n".join(f"  {name:15} {_percentiles(seconds)}" for name, seconds in named.items())


def _percentiles(seconds: Sequence[float]) -> str:
    shares = torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)
    p50, p95, p99 = (1e3 * torch.tensor(seconds, dtype=torch.float64).quantile(shares)).tolist()
    return f"p50 {p50:7.1f} ms, p95 {p95:7.1f} ms, p99 {p99:7.1f} ms"


def watch(submit: Submit, requests: Sequence[Request], gap: float) -> Latencies:
    """Send requests with a gap between them, and note when their tokens come.

    Args:
        submit: Takes a request and what is given its events, as ``Engine.submit`` does.
        requests: In the order in which they come.
        gap: Seconds between two of them.

    Raises:
        RuntimeError: An answer did not end as it should.
    """
    result, failed, open_answers = Latencies(), list[Event](), threading.Semaphore(0)

    def deliver_to(sent: float) -> Callable[[Event], None]:
        latest: list[float] = []

        def deliver(event: Event) -> None:
            now = time.perf_counter()
            if isinstance(event, Delta):
                (result.between if latest else result.first).append(now - (latest or [sent])[-1])
                latest[:] = [now]
                return
            if event.reason not in ("length", "stop"):
                failed.append(event)
            open_answers.release()

        return deliver

    began = time.perf_counter()
    for number, request in enumerate(requests):
        time.sleep(max(0.0, began + number * gap - time.perf_counter()))
        submit(request, deliver_to(time.perf_counter()))
    for _ in requests:
        open_answers.acquire()
    result.seconds = time.perf_counter() - began
    if failed:
        raise RuntimeError(f"{len(failed)} answers are not whole: {failed[0]}")
    return result
