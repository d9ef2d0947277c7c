"""DMS's serving cache: ragged slots on pages, each with a position and a mark; marked ones leave after a delay."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement

POSITION, MARKED = "position", "marked"


class LeavingSlots(NamedTuple):
    """What leaves the cache while several new tokens pass, seen by the first of them alone.

    The new tokens stand in columns 0, 1, 2, ... of their chunk, and column ``c`` here is seen by those up to ``c``.

    Attributes:
        keys: ``(B, H, E, D)``.
        values: ``(B, H, E, D)``.
        present: ``(B, H, E)`` which columns hold something.
    """

    keys: Tensor
    values: Tensor
    present: Tensor


class DMSCacheLayer(KVCacheLayer):
    """Keys (rotated) and values of one layer, a length for every row and head; their order means nothing.

    After T tokens a head holds all of them but those k that token k + 1 has marked and that are more than ``window``
    behind the latest: ``T - 1 - k > window``.

    Args:
        num_heads: Key-value heads.
        head_dim: Channels of a head.
        placement: Where tensors lie.
        window: Tokens for which a marked one is still seen.
        page_size: Slots in a page.
        kv_bits: Of a channel in quantized pages; None keeps keys and values as they are.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        placement: Placement,
        window: int,
        page_size: int,
        kv_bits: int | None = None,
    ) -> None:
        self.window = window
        fields = {POSITION: torch.int32, MARKED: torch.bool}
        dims = {"keys": head_dim, "values": head_dim}
        self.pages = PagedStore(num_heads, dims, page_size, placement, kv_bits, slot_fields=fields)
        super().__init__(self.pages)

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths

    def write_token(self, keys: Tensor, values: Tensor, marks: Tensor, past: Tensor, valid: Tensor | None) -> None:
        """Keep a new token of every row in the place of the one that leaves now, or where none does behind all others.

        Nothing moves, and the device is asked nothing where ``valid`` is None.

        Args:
            keys: ``(B, H, 1, D)``.
            values: ``(B, H, 1, D)``.
            marks: ``(B, H)`` whether the token marks the one before it.
            past: ``(B,)`` tokens that rows have seen.
            valid: ``(B, 1)`` which tokens are real; None: all, and room has been taken ahead.
        """
        slot = previous = self.pages.lengths.unsqueeze(-1)
        if self.pages.num_slots:
            position, before, live = self.pages.field(POSITION), past[:, None, None], self.pages.live()
            is_previous = live & (position == before - 1)
            marked = self.pages.field(MARKED) | (is_previous & marks.unsqueeze(-1))
            slot = _first(marked & (position < before - self.window), slot)
            previous = _first(is_previous, slot)  # a row's first token has none before it, and marks nothing
        keep = None if valid is None else valid.unsqueeze(1).expand(slot.shape)
        self.pages.write({MARKED: marks.unsqueeze(-1)}, previous, keep)
        entries = {"keys": keys, "values": values, MARKED: torch.zeros_like(marks).unsqueeze(-1)}
        self.pages.write({**entries, POSITION: past[:, None, None].expand(slot.shape)}, slot, keep)

    def advance(self, marks: Tensor, past: Tensor, valid: Tensor) -> LeavingSlots | None:
        """Before several new tokens enter: mark the one before them, and evict what the last of them does not see.

        Args:
            marks: ``(B, H)`` whether the first new token of a row marks the one before it; False where there is none.
            past: ``(B,)`` tokens that rows have seen.
            valid: ``(B, n)`` which of the new ones are real; padding stands before them.

        Returns:
            Of what was evicted that which the first new tokens still see; None where there is no such slot.
        """
        if not self.pages.num_slots:
            return None
        position, before = self.pages.field(POSITION), past[:, None, None]
        is_previous = self.pages.live() & (position == before - 1)
        marked = self.pages.field(MARKED) | (is_previous & marks.unsqueeze(-1))
        self.pages.set_field(MARKED, marked)
        new = valid.sum(1)[:, None, None]
        oldest_seen = before - self.window  # by the first new token, which stands behind the row's padding
        victims = marked & (position < oldest_seen + new - 1)
        column = position - oldest_seen + (valid.shape[1] - new)
        leaving = self._read(victims & (position >= oldest_seen), column)
        self.pages.evict(victims)
        return leaving

    def _read(self, chosen: Tensor, column: Tensor) -> LeavingSlots | None:
        """Copies of the slots ``chosen (B, H, K)``, each in its ``column (B, H, K)``."""
        row, head, slot = chosen.nonzero(as_tuple=True)
        if not len(row):
            return None
        column = column[row, head, slot]
        size = (*chosen.shape[:2], int(column.max()) + 1)
        present = torch.zeros(size, dtype=torch.bool, device=chosen.device)
        present[row, head, column] = True
        page, place = self.pages.table[row, head, slot // self.pages.page_size], slot % self.pages.page_size
        copies = []
        for name in ("keys", "values"):
            states = self.pages.unpack(name, self.pages.pool.slots[name][page, place])
            dense = states.new_zeros(*size, states.shape[-1])
            dense[row, head, column] = states
            copies.append(dense)
        return LeavingSlots(copies[0], copies[1], present)

    def append(self, keys: Tensor, values: Tensor, marked: Tensor, past: Tensor, valid: Tensor) -> None:
        """Keep new tokens, but for those that are marked and too far behind the last of them already.

        Args:
            keys: ``(B, H, n, D)``.
            values: ``(B, H, n, D)``.
            marked: ``(B, H, n)`` bool; the last token of a row is not.
            past: ``(B,)`` tokens before them.
            valid: ``(B, n)`` real tokens; padding stands before them.
        """
        positions = past[:, None] + valid.cumsum(1) - 1  # (B, n)
        last = (past + valid.sum(1) - 1)[:, None]
        keep = valid.unsqueeze(1) & ~(marked & (last - positions > self.window).unsqueeze(1))
        entries = {"keys": keys, "values": values, MARKED: marked}
        entries[POSITION] = positions.unsqueeze(1).expand(marked.shape)
        self.pages.write(entries, self.pages.lengths.unsqueeze(-1) + keep.cumsum(-1) - 1, keep)


def _first(marked: Tensor, otherwise: Tensor) -> Tensor:
    """The first marked slot of ``(B, H, K)``, or where there is none another ``(B, H, 1)``."""
    return torch.where(marked.any(-1, keepdim=True), marked.int().argmax(-1, keepdim=True), otherwise)
