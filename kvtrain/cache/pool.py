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
        self.free: list[int] = []  # the first one goes first

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
        """Numbers of ``count`` free pages, int32; the caller has made sure that the budget allows them.

        Args:
            count: Pages wanted.
            spare: Free pages that may remain if the pool has to grow; the more, the rarer it does.
        """
        missing = count - len(self.free)
        if missing > 0:
            self._grow(missing, spare)
        pages, self.free = self.free[:count], self.free[count:]
        return torch.tensor(pages, dtype=torch.int, device=self.keys.device)

    def spare_bytes(self) -> int:
        """Bytes of spare pages that it may take besides, when it grows."""
        return self.num_pages // _GROWTH * self.page_bytes

    def release(self, pages: Tensor) -> None:
        """Take pages back."""
        self.free += pages.tolist()

    def shrink(self, spare: int) -> Tensor | None:
        """Give memory back until at most ``spare`` pages are free.

        Returns:
            The new number of every page, ``(num_pages,)``, or None where nothing changed.
        """
        surplus = len(self.free) - spare
        if surplus <= 0:
            return None
        size = self.num_pages - surplus
        is_free = torch.zeros(self.num_pages, dtype=torch.bool, device=self.keys.device)
        is_free[self.free] = True
        numbers = torch.arange(self.num_pages, dtype=torch.int, device=self.keys.device)
        moving, holes = numbers[size:][~is_free[size:]], numbers[:size][is_free[:size]]
        target = holes[: moving.numel()]
        numbers[moving] = target
        self.keys[target], self.values[target] = self.keys[moving], self.values[moving]
        self.keys, self.values = self.keys[:size].clone(), self.values[:size].clone()
        self.free = holes[moving.numel() :].tolist()
        return numbers

    def tensors(self) -> list[Tensor]:
        """Every tensor that the pool holds."""
        return [self.keys, self.values]

    def _grow(self, count: int, spare: int) -> None:
        spare = min(spare, self.spare_bytes() // self.page_bytes)
        if self.budget is not None:
            spare = min(spare, self.budget.left // self.page_bytes - count)
        size, count = self.num_pages, count + max(0, spare)
        # Zeros, not whatever memory held: an unused slot gets weight 0, and 0 * NaN is NaN.
        self.keys = torch.cat([self.keys, self.keys.new_zeros(count, *self.keys.shape[1:])])
        self.values = torch.cat([self.values, self.values.new_zeros(count, *self.values.shape[1:])])
        self.free += range(size, size + count)
