"""How many bytes caches may take together."""

import weakref
from typing import Protocol


class CacheFullError(ValueError):
    """Tokens or rows do not fit into the byte budget; the cache is as it was before."""


class Holder(Protocol):
    """Something that holds bytes."""

    def num_bytes(self) -> int:
        """Bytes allocated."""


class ByteBudget:
    """A limit on what every store that names it holds, free pages and page tables included.

    One budget may serve several caches: what a forgotten cache held is free again by itself.

    Args:
        limit: Bytes.

    Raises:
        ValueError: ``limit`` is not positive.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a byte budget must be positive, not {limit}; pass None for no limit")
        self.limit = limit
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()

    def __deepcopy__(self, _: dict[int, object]) -> "ByteBudget":
        """A copied cache shares the budget."""
        return self

    def register(self, holder: Holder) -> None:
        """Count a store's bytes."""
        self._holders.add(holder)

    @property
    def used(self) -> int:
        """Bytes held at present."""
        return sum(holder.num_bytes() for holder in self._holders)

    @property
    def left(self) -> int:
        """Bytes that may still be taken; negative where page tables overran."""
        return self.limit - self.used

    def require(self, num_bytes: int, purpose: str) -> None:
        """Make sure that so many bytes more are allowed.

        Args:
            num_bytes: Bytes about to be taken.
            purpose: What for, as the message says it.

        Raises:
            CacheFullError: They are not.
        """
        used = self.used
        if used + num_bytes > self.limit:
            raise CacheFullError(
                f"{purpose} may take {num_bytes:,} bytes more, but {used:,} of a budget of {self.limit:,} are in use: "
                "free rows, feed fewer tokens at a time, or raise the budget"
            )
