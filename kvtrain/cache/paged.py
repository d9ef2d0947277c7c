"""Keys and values of ragged length on small pages: every (row, head) owns what it keeps and no more."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.cache.page_allocator import PageAllocator
from kvtrain.cache.pool import PagePool
from kvtrain.cache.rows import Placement, RowSnapshot, bookkeeping
from kvtrain.kernels.page_codec import PageCodec, RoundedVectors
from kvtrain.kernels.page_layout import PageLayout
from kvtrain.kernels.quantization import dequantize, packed_width, quantize

_OF_SNAPSHOTS = {"lengths", "owned"}  # what they hold besides pages


class PagedStore(PageAllocator):
    """Slots of keys and values with a length per row and key-value head.

    A store never holds more pages than ``slots kept / page_size + one per (row, head)``: it grows by what it
    needs and little more, and gives memory back as soon as rows leave.

    Args:
        num_heads: Key-value heads, H.
        dims: Channels of everything that a slot holds, by name: ``{"keys": D, "values": D_v}``, or those of several
            layers whose heads have the same length.
        page_size: Slots in a page.
        placement: Where tensors lie.
        bits: 8, 4 or 2: what is written is quantized, every slot of every head by itself, and pages hold bytes; the
            dtype of ``placement`` is then that of the copies that ``gather`` makes.
        group: Channels that share a scale where there are ``bits``; None: all of a vector.
        max_slots: The most slots that a head ever has, because the caller evicts some or overwrites them before there
            are more: what byte budgets count with. None: every token may take one.
        num_unbounded: Heads, the first ones, for which there is no such number.
        slot_fields: Dtype of every scalar that is kept beside a slot, by name: it is stored as it is, whatever
            ``placement`` and ``bits`` are, goes where its slot goes, and is 0 until it is written. Who writes to the
            pages themselves leaves slots that are not in use at 0.

    Raises:
        ValueError: ``page_size`` or ``max_slots`` is below 1, a field's name is taken, or ``bits`` or the dims for them
            are not possible.
    """

    def __init__(
        self,
        num_heads: int,
        dims: Mapping[str, int],
        page_size: int = 32,
        placement: Placement | None = None,
        bits: int | None = None,
        max_slots: int | None = None,
        num_unbounded: int = 0,
        slot_fields: Mapping[str, torch.dtype] | None = None,
        group: int | None = None,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        if max_slots is not None and max_slots < 1:
            raise ValueError(f"max_slots must be at least 1, not {max_slots}; None is no limit")
        self.slot_fields = dict(slot_fields or {})
        if taken := self.slot_fields.keys() & {*dims, *_OF_SNAPSHOTS}:
            raise ValueError(f"a slot field cannot be called {min(taken)!r}: the name is taken, choose another")
        placement = placement or Placement()
        if bits is None:
            pool = PagePool(page_size, dims, placement, self.slot_fields)
        else:
            packed = {name: packed_width(dim, bits, group) for name, dim in dims.items()}
            pool = PagePool(page_size, packed, replace(placement, dtype=torch.uint8), self.slot_fields)
        super().__init__(num_heads, pool, placement, max_slots, num_unbounded)
        self.bits, self.group, self.dims = bits, group, dict(dims)
        self.codec: PageCodec | None = None if bits is None else RoundedVectors(bits, group)

    @property
    def slot_tokens(self) -> int:
        """Tokens that a slot holds."""
        return self.rows.slot_tokens

    def layout(self) -> PageLayout:
        """Whose the pages are, for attention over all heads."""
        if self.rows.padded is not None:
            return self.rows.padded
        return self.rows.layout(self.pool.num_pages, copies=self.codec is not None)

    @bookkeeping
    def write(
        self, entries: Mapping[str, Tensor], slots: Tensor, keep: Tensor | None = None, packed: bool = False
    ) -> None:
        """Put entries into slots, taking pages as they are needed.

        Args:
            entries: ``(B, H, n, channels)`` by name, of a field ``(B, H, n)``; what is not named stays as it is, and a
                field of a slot that was not in use is 0.
            slots: ``(B, H, n)`` slot of each entry within its row and head.
            keep: ``(B, H, n)`` which entries are written; kept slots of one head must differ. None: all are, each of
                them the only one of its head, and ``take_ahead`` has taken the pages that they lie on.
            packed: Entries are what pages hold of them already.

        Raises:
            CacheFullError: The byte budget does not allow the pages; nothing was written.
        """
        if keep is None:
            page, place = self.rows.places(slots)
            for name, states in entries.items():
                self.pool.slots[name][page, place] = self._held(name, states.detach())
            return
        if not keep.numel():
            return
        self._reserve(torch.maximum(self.lengths, torch.where(keep, slots + 1, 0).amax(-1)))
        row, head, entry = keep.nonzero(as_tuple=True)
        slot = slots[row, head, entry]
        page, place = self.table[row, head, slot // self.page_size], slot % self.page_size
        for name, states in entries.items():
            kept = states.detach()[row, head, entry]
            self.pool.slots[name][page, place] = self._held(name, kept, packed)

    def append(self, entries: Mapping[str, Tensor], valid: Tensor) -> None:
        """Put the entries of real tokens, ``valid (B, n)``, behind what every head holds; see ``write``."""
        keep = valid[:, None].expand(-1, self.num_heads, -1)
        self.write(entries, self.lengths.unsqueeze(-1) + keep.cumsum(-1) - 1, keep)

    def gather(self, name: str, slots: Tensor, heads: slice = slice(None)) -> Tensor:
        """Copies ``(B, H, n, channels)`` of the slots ``(B, n)`` of some heads, all by default; they must be owned."""
        return self.unpack(name, self.gather_packed(name, slots, heads))

    def gather_packed(self, name: str, slots: Tensor, heads: slice = slice(None)) -> Tensor:
        """As ``gather``, but what pages hold of them."""
        table = self.table[:, heads]
        columns = (slots // self.page_size)[:, None].expand(-1, table.shape[1], -1)
        return self.pool.slots[name][table.gather(2, columns), (slots % self.page_size)[:, None]]

    def pack(self, states: Tensor) -> Tensor:
        """What pages hold of ``(..., channels)``: bytes, or without ``bits`` the same numbers in the pages' dtype."""
        return states.to(self.placement.dtype) if self.bits is None else quantize(states, self.bits, self.group)

    def unpack(self, name: str, slots: Tensor) -> Tensor:
        """The inverse of ``pack``, as far as there is one, of what is kept by this name; zero bytes are zeros."""
        if self.bits is None or name in self.slot_fields:
            return slots
        return dequantize(slots, self.bits, self.dims[name], self.placement.dtype, self.group)

    def _held(self, name: str, states: Tensor, packed: bool = False) -> Tensor:
        """What pages hold of entries by this name, which may be that already."""
        if name in self.slot_fields:
            return states.to(self.slot_fields[name])
        return states if packed else self.pack(states)

    def gather_row(self, row: int, head: int) -> dict[str, Tensor]:
        """Copies of the slots ``(length, channels)`` of one head, by name; of a field ``(length,)``."""
        pages, length = self.table[row, head], int(self.lengths[row, head])
        pages = pages[pages >= 0]
        copies = {name: slots[pages].flatten(0, 1)[:length] for name, slots in self.pool.slots.items()}
        return {name: self.unpack(name, slots) for name, slots in copies.items()}

    @property
    def num_slots(self) -> int:
        """Slots of as many pages as the longest head owns, K: how wide masks and fields are."""
        return self.rows.columns * self.page_size

    def live(self) -> Tensor:
        """Slots in use, ``(B, H, K)`` bool: the first ones of every head."""
        return torch.arange(self.num_slots, device=self.lengths.device) < self.lengths.unsqueeze(-1)

    def field(self, name: str) -> Tensor:
        """A copy of a field, ``(B, H, K)`` by slot; 0 beyond what a head has."""
        return self.by_slot(self.pool.slots[name])

    def by_slot(self, pages: Tensor) -> Tensor:
        """What there is for every slot of the pool, ``(pages, page_size)``, as ``field`` gives it."""
        if not len(pages):
            return pages.new_zeros(*self.lengths.shape, self.num_slots)
        nobody = (self.table < 0).unsqueeze(-1)  # such a number stands for the last page of all, and what that holds
        return pages[self.table].masked_fill_(nobody, 0).flatten(2)

    @bookkeeping
    def set_field(self, name: str, values: Tensor) -> None:
        """Write a field of all slots in use, ``values (B, H, K)``; those of other slots are ignored."""
        values = torch.where(self.live(), values.detach(), 0).to(self.slot_fields[name])
        owned = self.table >= 0
        self.pool.slots[name][self.table[owned]] = values.unflatten(2, (self.rows.columns, self.page_size))[owned]

    @bookkeeping
    def truncate(self, lengths: Tensor) -> None:
        """See ``PageAllocator``."""
        if self.slot_fields:
            self._clear_fields_from(lengths)
        super().truncate(lengths)

    @bookkeeping
    def evict(self, victims: Tensor) -> None:
        """Forget some slots: the last ones of their heads move into the holes, and nothing else moves.

        A page without slots is given back, unless it is the one of a head's next slot: where a head gains a slot and
        loses one in turn, the table stays as it is.

        Args:
            victims: ``(B, H, K)`` bool, as wide as ``live``; marks of slots that are not in use are ignored.
        """
        victims = (victims & self.live()).flatten(0, 1)
        head, slot = victims.nonzero().unbind(1)
        if not len(head):
            return
        lengths, lost = self.lengths.flatten(), victims.sum(-1)
        left = lengths - lost
        # Every head gives up as many of its last slots as it has victims, so that both are listed side by side.
        last = torch.arange(len(head), device=head.device) + (lengths - lost.cumsum(0))[head]
        slots = torch.stack([slot, last])
        page, place = self.table.flatten(0, 1)[head, slots // self.page_size], slots % self.page_size
        target, vacated = torch.add(place, page, alpha=self.page_size)
        source, is_hole = vacated, slot < left[head]
        plain = bool((is_hole & (place[1] < self.page_size - 1)).all())
        if not plain:  # some victims are among the last slots: as many others stay as there are holes
            target, source = target[is_hole], vacated[~victims[head, last]]
        self.pool.move(source, target, vacated)
        self.rows.shorten_to(left.view_as(self.lengths))
        self._ahead = True
        if not plain or len(self.pool.free):  # a page may be empty, or too many free for fewer slots
            self._release_empty()

    def _clear_fields_from(self, lengths: Tensor) -> None:
        """Let fields be 0 from ``lengths (B, H)`` on, where a page ends whose first slots stay in use."""
        used = lengths % self.page_size
        row, head = used.nonzero(as_tuple=True)
        pages = self.table[row, head, lengths[row, head] // self.page_size]
        beyond = torch.arange(self.page_size, device=lengths.device) >= used[row, head].unsqueeze(-1)
        for name in self.slot_fields:
            slots = self.pool.slots[name]
            slots[pages] = slots[pages].masked_fill_(beyond, 0)

    def select_rows(self, indices: Tensor) -> None:
        """See ``RowStore``; the first copy of a row keeps its pages, further ones get pages of their own."""
        self._require(self.bytes_to_select(indices))
        absent = torch.ones(self.num_rows, dtype=torch.bool, device=indices.device)
        absent[indices] = False
        dropped, table = self.table[absent], self.table[indices]
        copies = (table >= 0) & _seen_before(indices)[:, None, None]
        self.rows.lengths, self.rows.pages = self.lengths[indices], table
        self.pool.release(dropped[dropped >= 0])
        self._move_in(copies, self.pool.slots, table[copies])
        self._trim()

    def join(self, other: Self) -> None:
        """See ``RowStore``.

        Raises:
            ValueError: The other store's pages are of another form, such as quantized.
        """
        self._require(self.bytes_to_join(other))
        other._drop_ahead()
        before, owned = self.num_rows, other.table >= 0
        pages = other.table[owned]
        self.rows.add_rows(other.num_rows)
        self.rows.widen_to(other.rows.columns)
        self.rows.lengths[before:] = other.lengths.to(self.lengths.device)
        arriving = torch.zeros(self.table.shape, dtype=torch.bool, device=self.table.device)
        arriving[before:] = pad(owned, (0, self.rows.columns - other.rows.columns)).to(self.table.device)
        self._move_in(arriving, other.pool.slots, pages)

    def snapshot_row(self, row: int) -> RowSnapshot:
        """See ``RowStore``."""
        owned = ~self.rows.columns_from(self.rows.needed(self.lengths))[row]
        pages = self.table[row][owned]
        copies = {name: slots[pages] for name, slots in self.pool.slots.items()}
        return {**copies, "lengths": self.lengths[row].clone(), "owned": owned}

    def restore_row(self, row: int, snapshot: RowSnapshot) -> None:
        """See ``RowStore``.

        Raises:
            ValueError: The snapshot's pages are of another form.
        """
        self._require(self.bytes_to_restore(row, snapshot))
        owned = snapshot["owned"]
        pages = torch.arange(int(owned.sum()), device=self.table.device)
        self._replace_row(row, snapshot["lengths"], owned, snapshot, pages)

    def copy_row(self, source: int, target: int) -> None:
        """See ``RowStore``; page by page, and nothing is held in between but those of one name."""
        self._require(self.bytes_to_copy(source, target))
        owned = self.table[source] >= 0
        self._replace_row(target, self.lengths[source], owned, self.pool.slots, self.table[source][owned])

    def _replace_row(
        self, row: int, lengths: Tensor, owned: Tensor, slots: Mapping[str, Tensor], pages: Tensor
    ) -> None:
        """Let a row have ``lengths (H,)``, and copies of ``pages`` of some pool where ``owned (H, P)`` marks places."""
        self.pool.release(self.table[row][self.table[row] >= 0])
        index = torch.tensor([row], device=self.table.device)
        self.rows.pages = self.table.index_fill(0, index, -1)
        self.rows.lengths = self.lengths.index_copy(0, index, lengths[None].to(self.lengths.device))
        self.rows.widen_to(owned.shape[-1])
        arriving = torch.zeros(self.table.shape, dtype=torch.bool, device=self.table.device)
        arriving[row, :, : owned.shape[-1]] = owned
        self._move_in(arriving, slots, pages)
        self._trim()

    def bytes_to_join(self, other: Self) -> int:
        """See ``RowStore``; refuses pages of another form before any store has changed."""
        self._check_form(other.pool.slots)
        return self._bytes_to_hold(torch.cat([self.lengths, other.lengths.to(self.lengths.device)]))

    def bytes_to_restore(self, row: int, snapshot: RowSnapshot) -> int:
        """See ``RowStore``; refuses pages of another form before any store has changed."""
        self._check_form(snapshot)
        return self._bytes_to_replace(row, snapshot["lengths"])

    def bytes_to_copy(self, source: int, target: int) -> int:
        """See ``RowStore``."""
        return self._bytes_to_replace(target, self.lengths[source])

    def _check_form(self, pages: Mapping[str, Tensor]) -> None:
        """Refuse pages that cannot be copied as they are, before anything changes."""
        names, expected = sorted(pages.keys() - _OF_SNAPSHOTS), sorted(self.pool.slots)
        if names != expected:
            raise ValueError(
                f"pages of {', '.join(names)} do not fit a cache of {', '.join(expected)}: give both caches the same "
                "model and method"
            )
        for name, mine in self.pool.slots.items():
            theirs = pages[name]
            if theirs.shape[1:] != mine.shape[1:] or theirs.is_floating_point() != mine.is_floating_point():
                raise ValueError(
                    f"pages of {tuple(theirs.shape[1:])} {theirs.dtype} do not fit a cache of {tuple(mine.shape[1:])} "
                    f"{mine.dtype}: give both caches the same model, page size and bits"
                )

    def _move_in(self, places: Tensor, source: Mapping[str, Tensor], pages: Tensor) -> None:
        """Copy ``pages`` of some pool to fresh ones for the table's ``places (B, H, P)``; lengths are set already."""
        if not pages.numel():
            return
        fresh = self.pool.take(pages.numel(), spare=0)  # a later layer may need what the budget has left
        for name, slots in self.pool.slots.items():
            slots[fresh] = source[name][pages].to(slots)
        self.rows.put(places, fresh)


def _seen_before(indices: Tensor) -> Tensor:
    """Which entries repeat an earlier one."""
    same = indices[:, None] == indices
    return (same.tril(-1)).any(-1)
