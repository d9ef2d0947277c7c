"""Heads that own pages of a pool: how many they need, may take within the budget, and give back."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.cache.page_table import PageTable, most_pages
from kvtrain.cache.pool import PagePool
from kvtrain.cache.rows import Placement, RowStore, bookkeeping

_NEVER = 1 << 40  # tokens that no head comes to


class PageAllocator(RowStore):
    """The pages of every (row, head), of which it has as many as its slots need; what those hold is a subclass' matter.

    Args:
        num_heads: Key-value heads, H.
        pool: Where pages are taken from.
        placement: Where tensors lie.
        max_slots: The most slots that a head ever has, or None.
        num_unbounded: Heads, the first ones, that may have more all the same.
    """

    def __init__(
        self,
        num_heads: int,
        pool: PagePool,
        placement: Placement,
        max_slots: int | None = None,
        num_unbounded: int = 0,
    ) -> None:
        super().__init__(placement)
        self.num_heads, self.page_size, self.pool = num_heads, pool.page_size, pool
        self.max_slots, self.num_unbounded = max_slots, num_unbounded
        self.rows = PageTable(num_heads, pool.page_size, placement.device)
        self._ahead = False  # whether a head may own a page ahead of its slots

    @property
    def num_rows(self) -> int:
        """See ``RowStore``."""
        return self.lengths.shape[0]

    @property
    def lengths(self) -> Tensor:
        """``(B, H)`` slots that each head keeps."""
        return self.rows.lengths

    @property
    def table(self) -> Tensor:
        """``(B, H, P)`` pages of every head in order, int32, -1 where there is none."""
        return self.rows.pages

    def ask_ahead(self) -> Tensor | None:
        """See ``RowStore``: pages that heads lack for one more slot, and tokens that there is room for with them."""
        if self.rows.room > 0:
            self.rows.room -= 1
            return None
        owned = self.rows.owned()
        after = torch.maximum(owned, self.rows.needed(self._longest(1, 0)))
        now, ends = self._longest(0, 0), self._longest(_NEVER, 0)  # some heads stop growing
        room = (after * self.page_size - now).masked_fill(after * self.page_size >= ends, _NEVER)
        return torch.stack([(after - owned).sum(), room.amin() if room.numel() else room.sum()])

    def bytes_ahead(self, answer: list[int]) -> int:
        """See ``RowStore``."""
        return self._bytes_of(answer[0], self.rows.columns + 1, self.num_rows) if answer[0] else 0

    def take_ahead(self, answer: list[int]) -> None:
        """See ``RowStore``."""
        lacking, room = answer
        if lacking:
            spare = self._spare(self.lengths, int(self.rows.owned().sum()) + lacking)
            self._take(self.rows.needed(self._longest(1, 0)), lacking, spare)
            self._ahead = True
        self.rows.room = room - 1

    def pages_to_list(self) -> int:
        """See ``RowStore``."""
        if self.pool.capacity is None:
            raise ValueError("shapes change as pages are taken: reserve them by make_cache(budget, preallocate=True)")
        return self.rows.pages_to_list()

    @contextlib.contextmanager
    def fixed(self, pages: int) -> Iterator[None]:
        """See ``RowStore``."""
        with self.rows.fixed(pages), self.pool.whole():
            yield

    @bookkeeping
    def truncate(self, lengths: Tensor) -> None:
        """Forget the slots from ``lengths (B, H)`` on, and what was taken ahead of them; no head gets longer."""
        self.rows.lengths = lengths
        self._ahead = self._ahead and self.rows.others is not None  # others may still have some
        self._release_from(self.rows.needed(lengths))

    def admit(self, count: int) -> None:
        """See ``RowStore``."""
        self.rows.add_rows(count)

    def clear_rows(self, rows: Tensor) -> None:
        """See ``RowStore``."""
        self.truncate(self.lengths.index_fill(0, rows, 0))

    def row_bytes(self) -> Tensor:
        """See ``RowStore``."""
        return self.rows.owned().sum(1) * self.pool.page_bytes + self.rows.bytes_of(1, self.rows.columns)

    def narrow(self, rows: Tensor) -> None:
        """See ``RowStore``."""
        self.rows.narrow(rows)

    def widen(self) -> None:
        """See ``RowStore``."""
        self.rows.widen()

    def tensors(self) -> list[Tensor]:
        """See ``RowStore``."""
        return [*self.rows.tensors(), *self.pool.tensors()]

    def num_bytes(self) -> int:
        """See ``RowStore``; pages that are reserved count from when they are taken."""
        return self.rows.num_bytes() + self.pool.num_bytes()

    def free_bytes(self) -> int:
        """Bytes of pages that no row owns at present."""
        return self.pool.page_bytes * len(self.pool.free)

    def reserved_bytes(self) -> int:
        """See ``RowStore``."""
        return self.pool.reserved_bytes()

    def bytes_for(self, tokens: int, rows: int = 0) -> int:
        """See ``RowStore``: every token of every head appends, and the pool takes its spare pages if it grows."""
        needed = self.rows.needed(self._longest(tokens, rows))
        lacking = int((needed - pad(self.rows.owned(), (0, 0, 0, rows))).clamp(min=0).sum())
        spare = self.pool.spare_bytes() if lacking > len(self.pool.free) else 0
        return self._bytes_of(lacking, most_pages(needed), len(needed)) + spare

    def _longest(self, tokens: int, rows: int) -> Tensor:
        """Lengths ``(B + rows, H)`` that ``tokens`` more may lead to."""
        longest = pad(self.lengths, (0, 0, 0, rows)) + tokens
        if self.max_slots is not None:
            longest[:, self.num_unbounded :].clamp_(max=self.max_slots)
        return longest

    def bytes_to_select(self, indices: Tensor) -> int:
        """See ``RowStore``."""
        return self._bytes_to_hold(self.lengths[indices])

    def _bytes_to_replace(self, row: int, of_row: Tensor) -> int:
        """Bytes besides those that are here once a row has slots of the number ``of_row (H,)``."""
        lengths = self.lengths.clone()
        lengths[row] = of_row
        return self._bytes_to_hold(lengths)

    def _bytes_to_hold(self, lengths: Tensor) -> int:
        """Bytes besides those that are here once the rows have ``lengths (B, H)`` slots; 0 where they shrink."""
        self._drop_ahead()
        needed = self.rows.needed(lengths)
        return self._bytes_of(int(needed.sum() - self.rows.owned().sum()), most_pages(needed), len(needed))

    def _drop_ahead(self) -> None:
        """Give back what was taken ahead, before rows change places."""
        if self._ahead:
            self.truncate(self.lengths)

    def _bytes_of(self, lacking: int, columns: int, rows: int) -> int:
        """Bytes of so many pages more, free ones used up first, and of a table with so many columns and rows."""
        table = self.rows.bytes_of(rows, columns) - self.rows.num_bytes()
        more_pages = max(0, lacking - len(self.pool.free))
        if self.pool.capacity is not None and self.pool.num_pages + more_pages > self.pool.capacity:
            assert self.placement.budget is not None
            return self.placement.budget.limit + 1  # which is never allowed
        return more_pages * self.pool.page_bytes + max(0, table)

    def _reserve(self, lengths: Tensor) -> None:
        """Make every (row, head) own the pages for ``lengths (B, H)`` slots, and set the lengths."""
        needed, owned = self.rows.needed(lengths), self.rows.owned()
        count = int((needed - owned).clamp(min=0).sum())
        if count:
            self._require(self._bytes_of(count, most_pages(needed), len(needed)))
            self._take(needed, count, self._spare(lengths, int(owned.sum()) + count))
        self.rows.lengths, self.rows.room = lengths, 0

    def _take(self, needed: Tensor, count: int, spare: int) -> None:
        """Make every (row, head) own ``needed (B, H)`` pages at least: ``count`` more in all."""
        self.rows.widen_to(most_pages(needed))
        missing = ~self.rows.columns_from(needed) & (self.table < 0)
        pages = self.pool.take(count, spare)
        self.pool.clear_fields(pages)
        self.rows.put(missing, pages)

    def _release_from(self, kept: Tensor) -> None:
        """Give back the pages of every head but its first ``kept (B, H)``."""
        beyond = self.rows.columns_from(kept)
        self.pool.release(self.table[beyond & (self.table >= 0)])
        self.rows.pages = self.table.masked_fill(beyond, -1)
        self._trim()

    def _release_empty(self) -> None:
        """After slots have gone, give back pages without any, but for the one of a head's next slot: it comes soon."""
        owned, kept = self.rows.owned(), self.rows.needed(self._longest(1, 0))
        if bool((owned > kept).any()):
            self._release_from(kept)
        elif len(self.pool.free) > self._spare(self.lengths, int(owned.sum())):
            self._trim()

    def _spare(self, lengths: Tensor, owned: int) -> int:
        """Free pages that the bound on memory leaves room for, lengths and table counted."""
        tables = self.rows.num_bytes()
        spare = int(lengths.sum()) // self.page_size + lengths.numel() - owned
        return max(0, spare - -(-tables // self.pool.page_bytes))

    def _trim(self) -> None:
        """Give back what rows left behind, in pages and in table columns."""
        owned = self.rows.owned()
        self.rows.cut_to(most_pages(owned))
        numbers = self.pool.shrink(self._spare(self.lengths, int(owned.sum())))
        if numbers is not None:
            self.rows.renumber(numbers)
