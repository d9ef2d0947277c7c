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

    has_fixed_step = False  # how many slots leave, and from which pages, is asked in every step

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

    def advance(self, marks: Tensor, past: Tensor, valid: Tensor) -> LeavingSlots | None:
        """Before new tokens enter: mark the one before them, and evict what the last of them no longer sees.

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
        new, num_columns = valid.sum(1)[:, None, None], valid.shape[1]
        oldest_seen = before - self.window  # by the first new token
        victims = marked & (position < oldest_seen + new - 1)
        leaving = None
        if num_columns > 1:
            # That token stands in the column of the new ones that were real.
            column = position - oldest_seen + (num_columns - new)
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

    def append(
        self, keys: Tensor, values: Tensor, marked: Tensor, past: Tensor, valid: Tensor, *, single: bool
    ) -> None:
        """Keep new tokens, but for those that are marked and too far behind the last of them already.

        Args:
            keys: ``(B, H, n, D)``.
            values: ``(B, H, n, D)``.
            marked: ``(B, H, n)`` bool; the last token of a row is not.
            past: ``(B,)`` tokens before them.
            valid: ``(B, n)`` real tokens; padding stands before them.
            single: Every row has exactly one, a real one, for which room has been taken ahead.
        """
        positions = past[:, None] + valid.cumsum(1) - 1  # (B, n)
        entries = {"keys": keys, "values": values, MARKED: marked}
        entries[POSITION] = positions.unsqueeze(1).expand(marked.shape)
        if single:
            self.pages.write(entries, self.pages.lengths.unsqueeze(-1))
            return
        last = (past + valid.sum(1) - 1)[:, None]
        keep = valid.unsqueeze(1) & ~(marked & (last - positions > self.window).unsqueeze(1))
        self.pages.write(entries, self.pages.lengths.unsqueeze(-1) + keep.cumsum(-1) - 1, keep)
