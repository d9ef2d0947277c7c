"""One answer on its way, as the scheduler sees it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Row(Protocol):
    """A row of the cache, whatever its number is at present."""


class RowPool(Protocol):
    """What the scheduler asks of the cache. Whatever needs more than the budget has raises ``CacheFullError``."""

    @property
    def budget(self) -> int:
        """Bytes that rows may hold together."""

    @property
    def cuts_prompts(self) -> bool:
        """Whether a row that has read its prompt to the end holds less, and something else, than it did before.

        Then it is no beginning of a longer prompt, and tokens of an answer are no prompt when they are read again.
        """

    def take(self) -> Any:
        """An empty row."""

    def release(self, row: Any) -> None:
        """Forget what a row holds; it may be taken again."""

    def trim(self) -> bool:
        """Drop empty rows and give back what they hold all the same; whether there were any."""

    def copy(self, source: Any) -> Any:
        """A new row that holds what another one does."""

    def rollback(self, row: Any, tokens: int) -> None:
        """Forget the latest tokens of a row."""

    def snapshot(self, row: Any) -> Any:
        """What a row holds, on the host; it has ``num_bytes()``."""

    def restore(self, snapshot: Any) -> Any:
        """A new row that holds what a snapshot saw."""

    def row_bytes(self, rows: Sequence[Any]) -> list[int]:
        """Bytes that each of some rows holds."""

    def bytes_for(self, rows: Sequence[Any], tokens: int) -> int:
        """Bytes that the next tokens of each of some rows take at most."""


@dataclass(eq=False)
class ServedSequence:
    """An answer: its tokens, and where it stands.

    Args:
        prompt: Token ids.
        max_new_tokens: Upper bound.
        arrival: Its number among all sequences; older ones go first.
        replays: Whether its answer, after a preemption that forgot it, goes through the cache token by token, as it
            came, instead of being read as a prompt.

    Attributes:
        output: Tokens generated so far.
        row: Where the cache holds it; None while it waits.
        seen: Tokens that the row, or the snapshot of it, holds.
        snapshot: What the row held when it was swapped out.
        cut: Length at which the row is copied for other prompts that begin alike.
        waits_for: The sequence whose cut this one waits for.
        cached: Tokens of the prompt that it found in a kept row.
        preemptions: How often it had to make room.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival: int
    replays: bool = False
    output: list[int] = field(default_factory=list)
    row: Any = None
    seen: int = 0
    snapshot: Any = None
    cut: int | None = None
    waits_for: "ServedSequence | None" = None
    cached: int = 0
    preemptions: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.output)

    @property
    def unread(self) -> int:
        """Tokens still to be read as a prompt; after a preemption, those of the answer but the last may count too."""
        if self.replays:
            return max(0, len(self.prompt) - self.seen)
        return self.length - self.seen - bool(self.output)

    @property
    def decoding(self) -> bool:
        """Whether the next token to be fed is one of the answer, by itself: as a rule the latest."""
        return bool(self.output) and self.unread == 0

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """Tokens of the prompt and of the answer at these positions."""
        own = len(self.prompt)
        answer = self.output[max(0, begin - own) : max(0, end - own)]
        return (*self.prompt[begin:end], *answer)
