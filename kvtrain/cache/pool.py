"""Pages of keys and values: taken, released, reused, and given back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvtrain.cache.rows import Placement

_GROWTH = 16  # a pool that must grow asks for one spare page for every 16 it holds


class PagePool:
    """Equal pages, and a list of those that nobody owns.

    Args:
        page_size: Slots in a page.
        dims: Channels of everything that a slot holds, by name: ``{"keys": D, "values": D_v}``.
        placement: Where pages lie.

    Attributes:
        slots: ``(pages, page_size, channels)`` by name; a page has the same number in all of them.
    """

    def __init__(self, page_size: int, dims: Mapping[str, int], placement: Placement) -> None:
        self.budget, self.page_size, self.device = placement.budget, page_size, placement.device
        self.slots = {
            name: torch.zeros(0, page_size, dim, dtype=placement.dtype, device=placement.device)
            for name, dim in dims.items()
        }
        self.page_bytes = page_size * sum(dims.values()) * placement.dtype.itemsize
        self.free: list[int] = []  # the first one goes first
        self.num_pages = 0  # owned or free

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
        return torch.tensor(pages, dtype=torch.int, device=self.device)

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
        is_free = torch.zeros(self.num_pages, dtype=torch.bool, device=self.device)
        is_free[self.free] = True
        numbers = torch.arange(self.num_pages, dtype=torch.int, device=self.device)
        moving, holes = numbers[size:][~is_free[size:]], numbers[:size][is_free[:size]]
        target = holes[: moving.numel()]
        numbers[moving] = target
        for name, slots in self.slots.items():
            slots[target] = slots[moving]
            self.slots[name] = slots[:size].clone()
        self.num_pages = size
        self.free = holes[moving.numel() :].tolist()
        return numbers

    def tensors(self) -> list[Tensor]:
        """Every tensor that the pool holds."""
        return list(self.slots.values())

    def _grow(self, count: int, spare: int) -> None:
        spare = min(spare, self.spare_bytes() // self.page_bytes)
        if self.budget is not None:
            spare = min(spare, self.budget.left // self.page_bytes - count)
        size, count = self.num_pages, count + max(0, spare)
        # Zeros, not whatever memory held: an unused slot gets weight 0, and 0 * NaN is NaN.
        for name, slots in self.slots.items():
            self.slots[name] = torch.cat([slots, slots.new_zeros(count, *slots.shape[1:])])
        self.num_pages += count
        self.free += range(size, size + count)
