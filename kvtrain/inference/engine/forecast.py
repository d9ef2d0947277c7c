"""What a sequence will hold in the end: bytes a token as they are seen, and answers as long as they are seen."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MEMORY = 0.98  # of what was seen, at each new sight: some fifty sights count
_CAREFUL = 1.1  # after a preemption
_BOLD = 0.995  # after a sequence that ended
_BOLDEST, _MOST_CAREFUL = 0.98, 2.0


@dataclass(frozen=True)
class Growth:
    """A sequence on its way.

    Attributes:
        held: Bytes once its prompt is read.
        tokens: Tokens that are expected to come.
    """

    held: float
    tokens: float


class Forecast:
    """Learns bytes a token, as what was seen last has them in the mean, and which share of its tokens an answer takes.

    Args:
        fixed: Bytes of a row before its first token.
        slope: Bytes a token, to begin with.
        most: Bytes that a row comes to, however many tokens it gets.
    """

    def __init__(self, fixed: float, slope: float, most: float = math.inf) -> None:
        self._fixed, self._slope, self._least, self._most = fixed, slope, slope, most
        self._tokens = self._bytes = 0.0
        self._share = 1.0
        self.caution = _BOLDEST

    def observe(self, tokens: int, num_bytes: int) -> None:
        """See what a row of so many tokens holds; longer rows count more."""
        self._tokens = _MEMORY * self._tokens + tokens
        self._bytes = _MEMORY * self._bytes + max(0.0, num_bytes - self._fixed)
        self._slope = self._bytes / self._tokens
        self._least = min(self._least, self._slope)

    def ended(self, new_tokens: int, max_new_tokens: int) -> None:
        """See how long an answer has become."""
        self._share += 0.05 * (new_tokens / max_new_tokens - self._share)
        self.caution = max(_BOLDEST, self.caution * _BOLD)

    def preempted(self) -> None:
        """See that too many were let in."""
        self.caution = min(_MOST_CAREFUL, self.caution * _CAREFUL)

    def row_bytes(self, tokens: int) -> float:
        """Bytes expected of a row with so many tokens."""
        return min(self._fixed + self._slope * tokens, self._most)

    def least_bytes(self, tokens: int) -> int:
        """Bytes of a row with so many tokens that shrink as well as any that was seen."""
        return round(min(self._fixed + self._least * tokens, self._most))

    def tokens_to_come(self, new_tokens: int, max_new_tokens: int) -> float:
        """Tokens expected of an answer that has so many already; one that outlives the others is half-way on."""
        expected = self._share * max_new_tokens
        return expected - new_tokens if new_tokens < expected else (max_new_tokens - new_tokens) / 2

    def peak(self, sequences: Iterable[Growth]) -> float:
        """The most bytes that sequences hold at a time as they grow by a token a step and leave at their end."""
        waiting = sorted(sequences, key=lambda sequence: -sequence.tokens)
        most = held = 0.0
        for number, sequence in enumerate(waiting, 1):  # those that stay longest first: they are there at every end
            held += sequence.held
            most = max(most, held + number * self._slope * sequence.tokens)
        return self.caution * most
