"""Pages of keys and values: taken, released, reused, and given back."""

import torch
from torch import Tensor

from kvtrain.cache.rows import Placement

_GROWTH = 16  # a pool that must grow asks for one spare page for every 16 it holds


class PagePool:
    """Equal pages in two tensors, and a list of those that nobody owns.

    Args:
        page_size: Slots in a page.
        key_dim: Channels of a key, D.
        value_dim: Channels of a value, D_v.
        placement: Where pages lie.
    """

    def __init__(self, page_size: int, key_dim: int, value_dim: int, placement: Placement) -> None:
        self.budget = placement.budget
        self.keys = torch.zeros(0, page_size, key_dim, dtype=placement.dtype, device=placement.device)
        self.values = torch.zeros(0, page_size, value_dim, dtype=placement.dtype, device=placement.device)
        self.free = torch.zeros(0, dtype=torch.long, device=placement.device)

    @property
    def num_pages(self) -> int:
        """Pages, owned or free."""
        return self.keys.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        slots = self.keys.shape[1]
        return slots * (self.keys.shape[2] + self.values.shape[2]) * self.keys.element_size()

    def take(self, count: int, spare: int) -> Tensor:
        """Numbers of ``count`` free pages.

        Args:
            count: Pages wanted.
            spare: Free pages that may remain if the pool has to grow; the more, the rarer it does.

        Raises:
            CacheFullError: The budget does not allow them; nothing has changed.
        """
        self.require(count)
        missing = count - self.free.numel()
        if missing > 0:
            self._grow(missing, spare)
        pages, self.free = self.free[:count], self.free[count:].clone()
        return pages

    def require(self, count: int) -> None:
        """Make sure that ``take(count)`` would succeed, the free pages counted.

        Raises:
            CacheFullError: It would not.
        """
        missing = count - self.free.numel()
        if self.budget is not None and missing > 0:
            self.budget.require(missing * self.page_bytes, "the pages of new tokens or rows")

    def release(self, pages: Tensor) -> None:
        """Take pages back."""
        self.free = torch.cat([self.free, pages.to(self.free.dtype)])

    def shrink(self, spare: int) -> Tensor | None:
        """Give memory back until at most ``spare`` pages are free.

        Returns:
            The new number of every page, ``(num_pages,)``, or None where nothing changed.
        """
        surplus = self.free.numel() - spare
        if surplus <= 0:
            return None
        size = self.num_pages - surplus
        is_free = torch.zeros(self.num_pages, dtype=torch.bool, device=self.free.device)
        is_free[self.free] = True
        numbers = torch.arange(self.num_pages, device=self.free.device)
        moving, holes = numbers[size:][~is_free[size:]], numbers[:size][is_free[:size]]
        target = holes[: moving.numel()]
        numbers[moving] = target
        self.keys[target], self.values[target] = self.keys[moving], self.values[moving]
        self.keys, self.values = self.keys[:size].clone(), self.values[:size].clone()
        self.free = holes[moving.numel() :].clone()
        return numbers

    def tensors(self) -> list[Tensor]:
        """Every tensor that the pool holds."""
        return [self.keys, self.values, self.free]

    def _grow(self, count: int, spare: int) -> None:
        spare = min(spare, self.num_pages // _GROWTH)
        if self.budget is not None:
            spare = min(spare, self.budget.left // self.page_bytes - count)
        size, count = self.num_pages, count + spare
        # Zeros, not whatever memory held: an unused slot gets weight 0, and 0 * NaN is NaN.
        self.keys = torch.cat([self.keys, self.keys.new_zeros(count, *self.keys.shape[1:])])
        self.values = torch.cat([self.values, self.values.new_zeros(count, *self.values.shape[1:])])
        self.free = torch.cat([self.free, torch.arange(size, size + count, device=self.free.device)])
