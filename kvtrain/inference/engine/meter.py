"""Counts what an engine does."""

import time
from collections import Counter, deque

from torch import Tensor

from kvtrain.inference.engine.runner import Runner
from kvtrain.inference.engine.scheduler import Scheduler
from kvtrain.inference.engine.stats import EngineStats

_LOOK = 0.25  # seconds between two looks at what rows hold
_WINDOW = 5.0  # seconds over which speed is a mean


class Meter:
    """Statistics of a scheduler and the rows it gives away.

    Args:
        runner: With the cache.
        scheduler: Over its rows.

    Attributes:
        new_tokens: Generated so far.
        cached_prompt_tokens: Of prompts, found in kept rows so far.
        finished: Sequences that have ended, by reason.
        stats: The latest figures, which are never changed but replaced as a whole: any thread may read them.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler
        self.new_tokens = self.cached_prompt_tokens = self._steps = 0
        self.finished: Counter[str] = Counter()
        self._speed: deque[tuple[float, int]] = deque()
        self.stats = EngineStats()
        self.look(time.monotonic())

    def step(self, now: float) -> bool:
        """Count a step; look if the last look is some time ago, or nothing is left to do, and say whether."""
        self._steps += 1
        due = now - self._looked >= _LOOK or not self._scheduler.busy
        if due:
            self.look(now)
        return due

    def look(self, now: float) -> None:
        """Replace ``stats``."""
        self._looked = now
        runner, scheduler, rows = self._runner, self._scheduler, self._runner.rows
        running = [sequence.row for sequence in scheduler.running]
        seen = [sequence.seen for sequence in scheduler.running]
        entries = runner.kept_tokens(running)
        there = entries >= 0
        kept = entries.where(there, 0).sum((0, 2)) / there[:, :1].sum((0, 2)) if running else entries.sum((0, 2))
        self.stats = EngineStats(
            queued=len(scheduler.queue),
            running=len(running),
            kept_prefixes=len(scheduler.kept),
            held_bytes=rows.cache.held_bytes(),
            kept_bytes=sum(rows.row_bytes(scheduler.kept.rows())),
            reserved_bytes=max(rows.cache.reserved_bytes(), rows.cache.kv_bytes()),
            swapped_bytes=scheduler.swapped_bytes,
            budget_bytes=rows.budget,
            plain_bytes=sum(seen) * runner.plain_token_bytes,
            seen_tokens=sum(seen),
            kept_tokens=kept.sum().item(),
            kept_share=_shares(entries, sum(seen)),
            new_tokens=self.new_tokens,
            prompt_tokens=scheduler.read_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            tokens_per_second=self._tokens_per_second(now),
            preemptions=scheduler.preemptions,
            finished=tuple(sorted(self.finished.items())),
            steps=self._steps,
            compilations=runner.compilations,
        )

    def _tokens_per_second(self, now: float) -> float:
        self._speed.append((now, self.new_tokens))
        while self._speed[0][0] < now - _WINDOW:
            self._speed.popleft()
        (first, before), (last, after) = self._speed[0], self._speed[-1]
        return (after - before) / (last - first) if last > first else 0.0


def _shares(entries: Tensor, seen: int) -> tuple[tuple[float | None, ...], ...]:
    """The share of tokens that every head keeps, ``[layer][head]``, of entries ``(layers, rows, H_kv)``."""
    if not seen:
        return ()
    sums = entries.sum(1).tolist()
    return tuple(tuple(None if kept < 0 else kept / seen for kept in layer) for layer in sums)
