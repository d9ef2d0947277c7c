"""Keys and values of ragged length on small pages: every (row, head) owns what it keeps and no more."""

import torch
from torch import Tensor

_GROWTH = 16  # a pool that must grow takes one spare page for every 16 it holds


class PagedStore:
    """Slots of keys and values with a length per row and key-value head.

    Pages come from one pool a store. The pool grows when it must; pages of rows that leave return to it.

    Args:
        num_heads: Key-value heads, H.
        page_size: Slots in a page.

    Raises:
        ValueError: ``page_size`` is below 1.
    """

    def __init__(self, num_heads: int, page_size: int = 32) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        self.num_heads, self.page_size = num_heads, page_size
        self.lengths = torch.zeros(0, num_heads, dtype=torch.long)  # (B, H)
        self.table = torch.zeros(0, num_heads, 0, dtype=torch.long)  # (B, H, P), -1 where there is no page
        self.free = torch.zeros(0, dtype=torch.long)
        self.keys: Tensor | None = None  # (pages, page_size, D)
        self.values: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows, B."""
        return self.lengths.shape[0]

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, keep: Tensor) -> None:
        """Put entries into slots, taking pages as they are needed.

        Args:
            keys: ``(B, H, n, D)``.
            values: ``(B, H, n, D)``.
            slots: ``(B, H, n)`` slot of each entry within its row and head.
            keep: ``(B, H, n)`` which entries are written; kept slots of one head must differ.
        """
        if self.keys is None or self.values is None:
            self._start(keys, values)
        assert self.keys is not None and self.values is not None
        filled = torch.where(keep, slots + 1, 0).amax(-1)
        self._reserve(torch.maximum(self.lengths, filled))
        row, head, entry = keep.nonzero(as_tuple=True)
        slot = slots[row, head, entry]
        page = self.table[row, head, slot // self.page_size]
        self.keys[page, slot % self.page_size] = keys[row, head, entry].to(self.keys.dtype)
        self.values[page, slot % self.page_size] = values[row, head, entry].to(self.values.dtype)

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``(B, H, S, D)`` padded to the longest, and which slots exist ``(B, H, S)``."""
        assert self.keys is not None and self.values is not None
        pages = self.table.clamp(min=0)
        keys, values = self.keys[pages].flatten(2, 3), self.values[pages].flatten(2, 3)
        exists = torch.arange(keys.shape[2], device=keys.device) < self.lengths.unsqueeze(-1)
        return keys, values, exists

    def select_rows(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows; every kept row gets pages of its own and the rest is freed.

        Args:
            indices: ``(B_new,)`` rows to take, in order.
        """
        self.lengths, table = self.lengths[indices], self.table[indices]
        owned = table >= 0
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[table[owned]], self.values[table[owned]]
        numbers = torch.arange(int(owned.sum()), device=table.device)
        self.table = torch.full_like(table, -1).masked_scatter(owned, numbers)
        self.free = self.free[:0]

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.__init__(self.num_heads, self.page_size)  # type: ignore[misc]

    def tensors(self) -> list[Tensor]:
        """Every tensor that the store holds."""
        held = [self.lengths, self.table, self.free, self.keys, self.values]
        return [tensor for tensor in held if tensor is not None]

    def free_bytes(self) -> int:
        """Bytes of pages that no row owns at present."""
        if self.keys is None or self.values is None:
            return 0
        page = self.keys[:1].nbytes + self.values[:1].nbytes
        return page * self.free.numel()

    def _start(self, keys: Tensor, values: Tensor) -> None:
        batch, device = keys.shape[0], keys.device
        self.lengths = torch.zeros(batch, self.num_heads, dtype=torch.long, device=device)
        self.table = torch.zeros(batch, self.num_heads, 0, dtype=torch.long, device=device)
        self.free = torch.zeros(0, dtype=torch.long, device=device)
        self.keys = keys.new_empty(0, self.page_size, keys.shape[-1])
        self.values = values.new_empty(0, self.page_size, values.shape[-1])

    def _reserve(self, lengths: Tensor) -> None:
        """Make every (row, head) own the pages for ``lengths (B, H)`` slots."""
        needed = -(-lengths // self.page_size)
        if (columns := int(needed.max()) - self.table.shape[2]) > 0:
            self.table = torch.nn.functional.pad(self.table, (0, columns), value=-1)
        columns_index = torch.arange(self.table.shape[2], device=lengths.device)
        missing = (columns_index < needed.unsqueeze(-1)) & (self.table < 0)
        count = int(missing.sum())
        if count > self.free.numel():
            self._grow(count - self.free.numel())
        self.table = self.table.masked_scatter(missing, self.free[:count])
        self.free = self.free[count:].clone()
        self.lengths = lengths

    def _grow(self, count: int) -> None:
        assert self.keys is not None and self.values is not None
        size = self.keys.shape[0]
        count += size // _GROWTH
        # Zeros, not whatever memory held: an unused slot gets weight 0, and 0 * NaN is NaN.
        self.keys = torch.cat([self.keys, self.keys.new_zeros(count, *self.keys.shape[1:])])
        self.values = torch.cat([self.values, self.values.new_zeros(count, *self.values.shape[1:])])
        self.free = torch.cat([self.free, torch.arange(size, size + count, device=self.free.device)])
