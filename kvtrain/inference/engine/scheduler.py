"""Who runs, who waits and who makes room: admission by expected bytes, passes within a step's tokens; no tensors."""

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from kvtrain.cache.budget import CacheFullError
from kvtrain.inference.engine.forecast import Forecast, Growth
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.prefixes import KeptRows, Match, parting
from kvtrain.inference.engine.sequence import RowPool, ServedSequence

_RECENT = 32  # prompts that came lately, and how many waiting ones are compared with a new one
_SIGHT = 32  # tokens between two looks at what a row holds


Fed = TypeVar("Fed")


class Chunk(NamedTuple):
    """Tokens of a sequence for the next pass: those from ``seen`` on."""

    sequence: ServedSequence
    tokens: int


Feed = Callable[[list[Chunk]], Fed]


@dataclass(frozen=True)
class Refusal:
    """A sequence that cannot go on, and why."""

    sequence: ServedSequence
    reason: str


class Scheduler:
    """Decides, step by step, which sequences hold a row and which tokens a pass feeds.

    A step is: ``admit``, then ``decode_pass`` and ``prompt_pass``, each with ``advance`` of what it fed. Older
    sequences go first everywhere, and the oldest that runs makes room for nobody: so all come through.

    Args:
        pool: The cache's rows.
        limits: Of the engine.
        forecast: What rows will hold.
        rollback: Whether rows can be cut to any length.

    Attributes:
        queue: Sequences without a row, the oldest first.
        running: Sequences with a row, the oldest first.
        kept: Rows for prompts to come.
        refused: Sequences that have been given up; whoever reads them empties the list.
        swapped_bytes: Of snapshots.
        preemptions: So far.
        read_tokens: Of prompts so far, those that a preemption had read again included.
    """

    def __init__(self, pool: RowPool, limits: Limits, forecast: Forecast, rollback: bool) -> None:
        self.pool, self.limits, self.forecast = pool, limits, forecast
        self.queue: list[ServedSequence] = []
        self.running: list[ServedSequence] = []
        self.kept = KeptRows(limits.shared_tokens, rollback)
        self.refused: list[Refusal] = []
        self.swapped_bytes = 0
        self.preemptions = self.read_tokens = 0
        self._recent: deque[tuple[int, ...]] = deque(maxlen=_RECENT)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.queue or self.running)

    def add(self, sequence: ServedSequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.queue, sequence, key=_arrival)

    def remove(self, sequence: ServedSequence, keep: bool) -> None:
        """Let a sequence go, wherever it stands.

        Args:
            sequence: Waiting or running.
            keep: Whether its row is worth keeping for prompts that go on with it.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.queue.remove(sequence)
        self._drop_snapshot(sequence)
        row, sequence.row = sequence.row, None
        if row is None:
            return
        keep = keep and not self.pool.cuts_prompts
        if keep and self.limits.kept_prefixes and sequence.seen >= self.limits.shared_tokens:
            self._keep(sequence.tokens(0, sequence.seen), row, branch=False)
        else:
            self.pool.release(row)

    def drop_kept(self) -> None:
        """Keep no rows for prompts to come."""
        while self._evict():
            pass
        self.pool.trim()

    # Admission

    def admit(self) -> None:
        """Give rows to waiting sequences as long as all are expected to fit in the end."""
        for sequence in list(self.queue):
            if len(self.running) >= self.limits.max_requests:
                return
            if self._waits_for_another(sequence):
                continue  # it is overtaken until what it has in common with an older one has been read
            if not self._expected_to_fit(sequence) or not self._seat(sequence):
                return

    def _waits_for_another(self, sequence: ServedSequence) -> bool:
        """Whether a running sequence reads what this one begins with, too."""
        if sequence.seen or not self.limits.kept_prefixes:
            return False
        first = sequence.waits_for
        if first is None or first.row is None or first.cut is None:
            older = (s for s in self.running if s.cut is not None and s.arrival < sequence.arrival)
            first = next((s for s in older if s.prompt[: s.cut] == sequence.prompt[: s.cut]), None)
            sequence.waits_for = first
        return first is not None

    def _expected_to_fit(self, sequence: ServedSequence) -> bool:
        if not self.running:
            return True
        running = self.running
        held = self.pool.row_bytes([s.row for s in running])
        growths = [self._growth(s, num_bytes) for s, num_bytes in zip(running, held, strict=True)]
        growths.append(self._growth(sequence, 0))
        return self.forecast.peak(growths) <= self.pool.budget

    def _growth(self, sequence: ServedSequence, held: int) -> Growth:
        expected = self.forecast.row_bytes(sequence.length)
        if sequence.seen and held:  # what it holds is known, what it has still to read is not
            expected = held + expected - self.forecast.row_bytes(sequence.seen)
        coming = self.forecast.tokens_to_come(len(sequence.output), sequence.max_new_tokens)
        return Growth(expected, coming)

    def _seat(self, sequence: ServedSequence) -> bool:
        """Find a row for a waiting sequence; whether there was one."""
        match = None if sequence.snapshot is not None else self._match(sequence)
        if match is not None:
            row = self._take_over(match)
        elif sequence.snapshot is not None:
            row = self._with_room(lambda: self.pool.restore(sequence.snapshot))
        else:
            row = self._with_room(self.pool.take)
        if row is None:
            if not self.running:
                self._refuse(sequence, f"a row for it does not fit into the budget of {self.pool.budget:,} bytes")
            return False
        if match is not None:
            sequence.seen = match.length
            sequence.cached = max(sequence.cached, match.length) if not sequence.preemptions else sequence.cached
        self._drop_snapshot(sequence)
        sequence.row, sequence.waits_for = row, None
        self.queue.remove(sequence)
        self._mark_cut(sequence)
        insort(self.running, sequence, key=_arrival)
        return True

    def _match(self, sequence: ServedSequence) -> Match | None:
        end = len(sequence.prompt) if sequence.replays else sequence.length
        return self.kept.find(sequence.tokens(0, end)) if self.limits.kept_prefixes else None

    def _take_over(self, match: Match) -> Any:
        """A row that holds the matching tokens alone: the kept one itself, or a copy where others may want that."""
        kept, surplus = match.kept, len(match.kept.tokens) - match.length
        row = None
        if kept.branch or surplus:
            row = self._with_room(lambda: self.pool.copy(kept.row), spared=match)
        if row is None:  # nobody else has gone on with it, or there is no room for both
            row = self.kept.remove(kept)
        if surplus:
            self.pool.rollback(row, surplus)
        return row

    def _mark_cut(self, sequence: ServedSequence) -> None:
        """Where the row will be copied for others: waiting ones, and those that may come as others came lately."""
        if sequence.output or not self.limits.kept_prefixes:
            return
        others = [*self._recent, *(other.prompt for other in self.queue[:_RECENT] if not other.seen)]
        sequence.cut = parting(sequence.prompt, others, max(self.limits.shared_tokens, sequence.seen + 1))
        self._recent.append(sequence.prompt)

    # Passes

    def decode_pass(self, feed: Feed[Fed]) -> tuple[list[Chunk], Fed] | None:
        """Feed the latest token of every sequence that has one; room is made for as long as there is too little.

        Args:
            feed: The pass itself; it raises ``CacheFullError`` before anything changes.

        Returns:
            What was fed and what ``feed`` gave for it; None where nothing was to be fed.
        """
        while batch := [Chunk(sequence, 1) for sequence in self.running if sequence.decoding]:
            try:
                return batch, feed(batch)
            except CacheFullError:
                self._relieve(batch[0].sequence)
        return None

    def prompt_pass(self, feed: Feed[Fed]) -> tuple[list[Chunk], Fed] | None:
        """Feed parts of prompts; as ``decode_pass``."""
        left = self.limits.step_tokens - sum(sequence.decoding for sequence in self.running)
        while batch := self._next_chunks(left):
            try:
                return batch, feed(batch)
            except CacheFullError:
                tokens = len(batch) * max(chunk.tokens for chunk in batch)
                if not self._make_room():
                    if tokens > 1:  # what a shorter part may take at most is nearer to what it takes
                        left = tokens // 2
                    else:
                        self._relieve(batch[0].sequence)
        return None

    def _next_chunks(self, left: int) -> list[Chunk]:
        """As many tokens as a step has left, the oldest sequence first; short ones are padded to one length."""
        batch: list[Chunk] = []
        width = real = 0
        for sequence in self.running:
            if sequence.unread <= 0:
                continue
            end = sequence.cut if sequence.cut is not None else sequence.seen + sequence.unread
            count = min(sequence.unread, end - sequence.seen, left)
            wider = max(width, count)
            padded = (len(batch) + 1) * wider
            if not batch or padded <= min(left, 2 * (real + count)):  # padding costs what tokens cost
                batch.append(Chunk(sequence, count))
                width, real = wider, real + count
        return batch

    def advance(self, chunk: Chunk) -> None:
        """Count what a pass has fed, and copy the row where prompts part."""
        sequence = chunk.sequence
        self.read_tokens += 0 if sequence.decoding else chunk.tokens
        before, sequence.seen = sequence.seen, sequence.seen + chunk.tokens
        if before // _SIGHT != sequence.seen // _SIGHT:
            self.forecast.observe(sequence.seen, self.pool.row_bytes([sequence.row])[0])
        if sequence.seen == sequence.cut:
            sequence.cut = None
            copied = self._with_room(lambda: self.pool.copy(sequence.row))
            if copied is not None:
                self._keep(sequence.tokens(0, sequence.seen), copied, branch=True)

    # Room

    def _with_room(self, action: Callable[[], Any], spared: Match | None = None) -> Any:
        """What an action gives, for which kept rows go as long as it finds no room; None if it never does."""
        trimmed = False
        while True:
            try:
                return action()
            except CacheFullError:  # which may itself have left a row empty
                trimmed, before = self.pool.trim() or trimmed, trimmed
                if trimmed == before and not self._evict(spared):
                    return None

    def _make_room(self, spared: Match | None = None) -> bool:
        """Give back what nobody uses, as little as possible; whether there was anything."""
        return self.pool.trim() or self._evict(spared)

    def _evict(self, spared: Match | None = None) -> bool:
        row = self.kept.evict(None if spared is None else spared.kept)
        if row is not None:
            self.pool.release(row)
        return row is not None

    def _keep(self, tokens: tuple[int, ...], row: Any, branch: bool) -> None:
        former = self.kept.add(tokens, row, branch)
        if former is not None:
            self.pool.release(former)
        while len(self.kept) > self.limits.kept_prefixes:
            self._evict()

    def _relieve(self, oldest: ServedSequence) -> None:
        """Make room for a pass: what nobody uses goes first, then the youngest; the last one is given up."""
        if self._make_room():
            return
        youngest = self.running[-1]
        if youngest is not self.running[0]:
            self._preempt(youngest)
            return
        held, more = self.pool.row_bytes([oldest.row])[0], self.pool.bytes_for([oldest.row], 1)
        reason = (
            f"it holds {held:,} bytes after {oldest.seen} tokens, the next may take {more:,} more, and that is above "
            f"the budget of {self.pool.budget:,} bytes"
        )
        self._refuse(oldest, f"{reason}: raise the budget, or ask for fewer tokens")

    def _preempt(self, sequence: ServedSequence) -> None:
        """Put a running sequence back into the queue; what it holds goes to the host, or is read again."""
        most = self.pool.budget if self.limits.swap_bytes is None else self.limits.swap_bytes
        if sequence.seen and self.swapped_bytes + self.pool.row_bytes([sequence.row])[0] <= most:
            sequence.snapshot = self.pool.snapshot(sequence.row)
            self.swapped_bytes += sequence.snapshot.num_bytes()
        else:
            sequence.seen = 0
        self.pool.release(sequence.row)
        sequence.row = sequence.cut = None
        sequence.preemptions += 1
        self.preemptions += 1
        self.forecast.preempted()
        self.running.remove(sequence)
        self.add(sequence)

    def _drop_snapshot(self, sequence: ServedSequence) -> None:
        if sequence.snapshot is not None:
            self.swapped_bytes -= sequence.snapshot.num_bytes()
            sequence.snapshot = None

    def _refuse(self, sequence: ServedSequence, reason: str) -> None:
        self.remove(sequence, keep=False)
        self.refused.append(Refusal(sequence, reason))


def _arrival(sequence: ServedSequence) -> int:
    return sequence.arrival
