"""Pages of keys and values: taken, released, reused, and given back."""

import contextlib
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from kvtrain.cache.rows import Placement

_GROWTH = 16  # a pool that must grow asks for one spare page for every 16 it holds


class PagePool:
    """Equal pages, and the numbers of those that nobody owns.

    A pool grows and shrinks by copying what it holds, so that it never has much more than that; one whose placement
    reserves memory takes it once, unused as long as no page is, and grows and shrinks by moving its end.

    Args:
        page_size: Slots in a page.
        dims: Channels of everything that a slot holds, by name: ``{"keys": D, "values": D_v}``.
        placement: Where pages lie.
        fields: Dtype of every scalar that a slot has besides, by name.

    Attributes:
        slots: ``(pages, page_size, channels)`` by name, of a field ``(pages, page_size)``; a page has the same number
            in all of them.
        free: Numbers of the free pages, int32; the first one goes first.
        num_pages: Owned or free.
        capacity: Pages that are reserved; None where none are.
    """

    def __init__(
        self,
        page_size: int,
        dims: Mapping[str, int],
        placement: Placement,
        fields: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.budget, self.page_size, self.device = placement.budget, page_size, placement.device
        self.fields = dict(fields or {})
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((dim,), placement.dtype) for name, dim in dims.items()
        }
        kinds |= {name: ((), dtype) for name, dtype in self.fields.items()}
        self.page_bytes = page_size * sum(prod(shape) * dtype.itemsize for shape, dtype in kinds.values())
        self.capacity = None if placement.reserve is None else placement.reserve // self.page_bytes
        make = torch.zeros if self.capacity is None else torch.empty  # which takes no memory until it is written
        self._memory = {
            name: make(self.capacity or 0, page_size, *shape, dtype=dtype, device=placement.device)
            for name, (shape, dtype) in kinds.items()
        }
        self.slots = {name: memory[:0] for name, memory in self._memory.items()}
        self.free = torch.zeros(0, dtype=torch.int, device=placement.device)
        self.num_pages = 0

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
        return pages

    def move(self, source: Tensor, target: Tensor, vacated: Tensor) -> None:
        """Copy slots, counted over all pages, to others; fields of those that are ``vacated`` become 0."""
        for name, slots in self.slots.items():
            slots = slots.flatten(0, 1)
            slots.index_copy_(0, target, slots.index_select(0, source))
            if name in self.fields:
                slots.index_fill_(0, vacated, 0)

    def clear_fields(self, pages: Tensor) -> None:
        """Let every field be 0 in all slots of some pages, whatever an earlier owner left there."""
        for name in self.fields:
            self.slots[name][pages] = 0

    def spare_bytes(self) -> int:
        """Bytes of spare pages that it may take besides, when it grows."""
        return 0 if self.capacity is not None else self.num_pages // _GROWTH * self.page_bytes

    def release(self, pages: Tensor) -> None:
        """Take pages back."""
        self.free = torch.cat([self.free, pages])

    def shrink(self, spare: int) -> Tensor | None:
        """Give memory back until at most ``spare`` pages are free; of a reserved pool, none is: those at its end move.

        Returns:
            The new number of every page, ``(num_pages,)``, or None where nothing changed.
        """
        surplus = len(self.free) - (0 if self.capacity is not None else spare)
        if surplus <= 0:
            return None
        size = self.num_pages - surplus
        is_free = torch.zeros(self.num_pages, dtype=torch.bool, device=self.device)
        is_free[self.free.long()] = True
        numbers = torch.arange(self.num_pages, dtype=torch.int, device=self.device)
        moving, holes = numbers[size:][~is_free[size:]], numbers[:size][is_free[:size]]
        target = holes[: moving.numel()]
        numbers[moving] = target
        for name, slots in self.slots.items():
            slots[target] = slots[moving]
            self.slots[name] = slots[:size].clone() if self.capacity is None else slots[:size]
        self.num_pages = size
        self.free = holes[moving.numel() :]
        return numbers

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Let ``slots`` be all that is reserved, so that their shape does not change as pages are taken."""
        slots, self.slots = self.slots, self._memory
        try:
            yield
        finally:
            self.slots = slots

    def tensors(self) -> list[Tensor]:
        """Every tensor that the pool holds."""
        return list(self.slots.values())

    def num_bytes(self) -> int:
        """Bytes of its pages, owned or free."""
        return self.num_pages * self.page_bytes

    def reserved_bytes(self) -> int:
        """Bytes that it has reserved, and of which its pages take a part; 0 where it reserves none."""
        return (self.capacity or 0) * self.page_bytes

    def _grow(self, count: int, spare: int) -> None:
        size = self.num_pages
        if self.capacity is None:
            spare = min(spare, self.spare_bytes() // self.page_bytes)
            if self.budget is not None:
                spare = min(spare, self.budget.left // self.page_bytes - count)
            count += max(0, spare)
        # Zeros, not whatever memory held: an unused slot gets weight 0, and 0 * NaN is NaN.
        for name, slots in self.slots.items():
            if self.capacity is None:
                self.slots[name] = torch.cat([slots, slots.new_zeros(count, *slots.shape[1:])])
            else:
                assert size + count <= self.capacity, "the store asks for room before it takes pages"
                self._memory[name][size : size + count] = 0
                self.slots[name] = self._memory[name][: size + count]
        self.num_pages += count
        self.free = torch.cat([self.free, torch.arange(size, size + count, dtype=torch.int, device=self.device)])
