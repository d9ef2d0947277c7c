"""Keys and values of a window: the first tokens of a row and its latest ones, in memory that ends to grow."""

import torch
from torch import Tensor

from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement, RowStore, bookkeeping
from kvtrain.cache.state import StateStore


class RingStore(StateStore):
    """``sink`` slots for a row's first tokens, then ``recent`` slots that the latest ones share in turn.

    Token ``p`` of a row lies in slot ``p`` if ``p < sink``, else in ``sink + (p - sink) % recent``: no slot ever
    moves, and rows of different length need no common clock.

    Args:
        num_heads: Key-value heads, H.
        head_dim: Channels of a key, D.
        recent: Latest tokens that are kept.
        sink: First tokens that are kept.
        placement: Where tensors lie.
        value_dim: Channels of a value; ``head_dim`` where absent.

    Raises:
        ValueError: ``recent`` is below 1 or ``sink`` negative.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        recent: int,
        sink: int = 0,
        placement: Placement | None = None,
        value_dim: int | None = None,
    ) -> None:
        if recent < 1 or sink < 0:
            raise ValueError(f"a ring keeps at least 1 recent token and no negative sink, not {recent} and {sink}")
        self.recent, self.sink = recent, sink
        placement = placement or Placement()
        slots = sink + recent
        keys = ((num_heads, slots, head_dim), placement.dtype)
        values = ((num_heads, slots, value_dim or head_dim), placement.dtype)
        super().__init__({"keys": keys, "values": values, "tokens": ((), torch.long)}, placement)

    @bookkeeping
    def write(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append the real tokens of every row.

        Args:
            keys: ``(B, H, n, D)``.
            values: ``(B, H, n, D_v)``.
            valid: ``(B, n)`` real tokens; None: one in every row.
        """
        tokens = self["tokens"]
        if valid is None:
            row, slot = torch.arange(len(tokens), device=tokens.device), self._slot(tokens)
            for name, new in (("keys", keys), ("values", values)):
                self[name][row, :, slot] = new.detach()[:, :, 0].to(self[name].dtype)
            self["tokens"] = tokens + 1
            return
        positions = tokens[:, None] + valid.cumsum(-1) - 1  # (B, n)
        total = tokens + valid.sum(-1)
        # Of several new tokens for one slot only the last may be written: the order of writes is not defined.
        kept = valid & ((positions < self.sink) | (positions >= total[:, None] - self.recent))
        row, entry = kept.nonzero(as_tuple=True)
        position = positions[row, entry]
        slot = self._slot(position)
        for name, new in (("keys", keys), ("values", values)):
            self[name][row, :, slot] = new.detach()[row, :, entry].to(self[name].dtype)
        self["tokens"] = total

    def _slot(self, position: Tensor) -> Tensor:
        if not self.sink:
            return position % self.recent
        return torch.where(position < self.sink, position, self.sink + (position - self.sink) % self.recent)

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys ``(B, H, S, D)``, values, and the position ``(B, S)`` of the token in each slot, -1 where none is."""
        slot = torch.arange(self.sink + self.recent, device=self["tokens"].device)
        return self["keys"], self["values"], _positions(self["tokens"], slot, self.recent, self.sink)


class PagedRing:
    """The latest tokens of a row, page by page until as many are held as ever will be.

    Token ``p`` of a row lies in slot ``p % recent``, so a row takes pages while its text is short and none later.

    Args:
        num_heads: Key-value heads, H.
        head_dim: Channels of a key and of a value, D.
        recent: Latest tokens that are kept.
        page_size: Slots in a page, unless all are fewer.
        placement: Where tensors lie.
    """

    def __init__(self, num_heads: int, head_dim: int, recent: int, page_size: int, placement: Placement) -> None:
        self.recent = recent
        dims = {"keys": head_dim, "values": head_dim}
        self.pages = PagedStore(num_heads, dims, min(page_size, recent), placement, max_slots=recent)
        self._counts = StateStore({"tokens": ((), torch.long)}, placement)

    @property
    def stores(self) -> list[RowStore]:
        """What rows join and leave."""
        return [self.pages, self._counts]

    def write(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """See ``RingStore``."""
        tokens, entries = self._counts["tokens"], {"keys": keys, "values": values}
        if valid is None:
            self.pages.write(entries, self._by_head((tokens % self.recent)[:, None]))
            self._counts["tokens"] = tokens + 1
            return
        positions = tokens[:, None] + valid.cumsum(-1) - 1  # (B, n)
        total = tokens + valid.sum(-1)
        # Of several new tokens for one slot only the last may be written: the order of writes is not defined.
        kept = valid & (positions >= total[:, None] - self.recent)
        self.pages.write(entries, self._by_head(positions.clamp(min=0) % self.recent), self._by_head(kept))
        self._counts["tokens"] = total

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of what is held, ``(B, H, S, D)``, and the position ``(B, S)`` in each slot; see ``RingStore``."""
        slot = torch.arange(min(self.recent, self.pages.num_slots), device=self.pages.lengths.device)
        positions = _positions(self._counts["tokens"], slot, self.recent)
        # Pages hold whatever they held before where no token lies.
        empty, table = (positions < 0)[:, None, :, None], self.pages.table.clamp(min=0)
        keys, values = (
            self.pages.pool.slots[name][table].flatten(2, 3)[:, :, : len(slot)].masked_fill(empty, 0.0)
            for name in ("keys", "values")
        )
        return keys, values, positions

    def _by_head(self, tensor: Tensor) -> Tensor:
        """``(B, n)`` the same for every head, ``(B, H, n)``."""
        return tensor[:, None].expand(-1, self.pages.num_heads, -1)


def _positions(tokens: Tensor, slot: Tensor, recent: int, sink: int = 0) -> Tensor:
    """Which token each slot ``(S,)`` holds of rows of ``tokens (B,)``, ``(B, S)``; -1 where none is."""
    tokens = tokens[:, None]
    turns = torch.div(tokens - 1 - slot, recent, rounding_mode="floor")
    positions = torch.where(slot < sink, slot, slot + turns * recent)
    return positions.masked_fill((positions >= tokens) | (positions < slot), -1)
