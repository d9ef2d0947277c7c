"""Slots of one layer: keys and values of ragged length on pages, fields beside them, and what is kept for a row."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import bookkeeping
from kvtrain.cache.state import StateStore
from kvtrain.kernels.paged_scores import paged_tiles
from kvtrain.models.eviction.observation import NewQueries

POSITION = "position"


class LayerShape(NamedTuple):
    """One layer of a model, as far as policies ask for it."""

    layer_idx: int
    num_layers: int
    num_query_heads: int
    num_heads: int  # of keys and values
    head_dim: int
    wide: torch.dtype  # of what is summed
    make_rotary: Callable[[], nn.Module]  # the host's rotary embedding of this layer


class LayerSlots(KVCacheLayer):
    """Keys (rotated) and values of one layer, some of which may leave: what policies look at and write to.

    Args:
        shape: Of the layer.
        pages: Slots with ``position`` and fields.
        state: Of every row: ``tokens`` that this layer has seen, the latest queries, and what else is kept.
        secondary: What has left ``pages`` and is attended all the same; None: nothing is.
        window: How many of a row's latest queries are remembered.
        sink: First tokens that always stay.
        recent: Latest tokens that always stay.
    """

    def __init__(
        self,
        shape: LayerShape,
        pages: PagedStore,
        state: StateStore,
        secondary: PagedStore | None,
        window: int,
        sink: int,
        recent: int,
    ) -> None:
        self.shape, self.num_heads = shape, shape.num_heads
        self.pages, self.state, self.secondary = pages, state, secondary
        self.window, self.sink, self.recent = window, sink, recent
        super().__init__(pages, state, *([] if secondary is None else [secondary]))

    @property
    def tokens(self) -> Tensor:
        """Tokens that have gone through this layer, ``(B,)``."""
        return self.state["tokens"]

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        if self.secondary is None:
            return self.pages.lengths
        return self.pages.lengths + self.secondary.lengths * self.secondary.slot_tokens

    @cached_property
    def _rotary(self) -> nn.Module:
        return self.shape.make_rotary().to(self.tokens.device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, n, D)`` by which the host rotates what stands at ``positions (B, n)``."""
        angles: tuple[Tensor, Tensor] = self._rotary(positions.new_empty((), dtype=self.shape.wide), positions)
        return angles

    def fresh_fields(self, positions: Tensor) -> dict[str, Tensor]:
        """Fields ``(B, H, n)`` of new tokens at ``positions (B, n)``, -1 for padding."""
        shape = (positions.shape[0], self.num_heads, positions.shape[1])
        kinds = self.pages.slot_fields.items()
        fields = {name: torch.zeros(shape, dtype=dtype, device=positions.device) for name, dtype in kinds}
        fields[POSITION] += positions.unsqueeze(1)
        return fields

    @bookkeeping
    def append(self, keys: Tensor, values: Tensor, fields: Mapping[str, Tensor], valid: Tensor, single: bool) -> None:
        """Keep new tokens behind what heads hold.

        Args:
            keys: ``(B, H, n, D)``.
            values: ``(B, H, n, D)``.
            fields: ``(B, H, n)`` by name; those of them that are 0 may be left out.
            valid: ``(B, n)`` real tokens.
            single: Every row has exactly one, a real one, for which room has been taken ahead.
        """
        entries = {"keys": keys, "values": values, **fields}
        if single:
            self.pages.write(entries, self.pages.lengths.unsqueeze(-1))
            self.state["tokens"] = self.tokens + 1
            return
        self.pages.append(entries, valid)
        self.state["tokens"] = self.tokens + valid.sum(1)

    def remember_queries(self, new: NewQueries, lse: Tensor, single: bool) -> None:
        """Keep the latest queries of every row, where the policy looks back.

        Args:
            new: The queries; padding stands before the real ones.
            lse: ``(B, H, n)``.
            single: Every row has exactly one, a real one, which is known without asking.
        """
        window = self.window
        if not window:
            return
        latest = slice(-window, None)
        query, positions = new.rotated[:, :, latest].detach() * new.scaling, new.positions[:, latest]
        lse = lse[:, :, latest].detach()
        if single:
            row = torch.arange(len(positions), device=positions.device)
            column = torch.zeros_like(row)
        else:
            row, column = (positions >= 0).nonzero(as_tuple=True)
        place = positions[row, column] % window
        self.state["queries"][row, :, place] = query[row, :, column].to(self.state["queries"].dtype)
        self.state["lse"][row, :, place] = lse[row, :, column].to(self.state["lse"].dtype)

    def window_sums(self) -> Tensor:
        """What the queries that are remembered give to every slot, ``(B, H, K)``."""
        window, pages = self.window, self.pages
        place = torch.arange(window, device=self.tokens.device)
        newest = self.tokens.unsqueeze(1) - 1
        positions = (newest - (newest - place) % window).clamp(min=-1)
        slots = pages.pool.slots
        sums = torch.zeros(slots[POSITION].shape, dtype=self.shape.wide, device=self.tokens.device)
        tiles = paged_tiles(
            self.state["queries"],
            slots["keys"],
            self.state["lse"],
            1.0,
            pages.table,
            pages.lengths,
            positions,
            key_positions=slots[POSITION],
            bits=pages.bits,
            layout=pages.layout(),
        )
        for tile in tiles:
            tile.add(sums, tile.column_sums())
        return pages.by_slot(sums)

    def read_slots(self, name: str, slots: Tensor) -> Tensor:
        """Copies ``(B, H, n, channels)`` of slots ``(B, H, n)``; of those that heads do not own, of anything."""
        pages = self.pages.table.gather(2, slots // self.pages.page_size).clamp(min=0)
        return self.pages.unpack(name, self.pages.pool.slots[name][pages, slots % self.pages.page_size])

    def read_all(self, name: str) -> Tensor:
        """Copies ``(B, H, K, channels)`` of all slots, in at least float32; as ``read_slots``."""
        places = torch.arange(self.pages.num_slots, device=self.tokens.device)
        return self.read_slots(name, places.expand(*self.pages.lengths.shape, -1)).to(self.shape.wide)

    def listed(self, victims: Tensor) -> tuple[Tensor, Tensor]:
        """Marked slots as ``(B, H, E)`` numbers in the order of their positions, and which of these there are.

        Args:
            victims: ``(B, H, K)``, all in use.
        """
        count = victims.sum(-1)
        later = self.pages.field(POSITION).masked_fill(~victims, torch.iinfo(torch.int32).max)
        most = int(count.amax()) if count.numel() else 0
        order = later.argsort(dim=-1)[..., :most]
        return order, torch.arange(most, device=count.device) < count.unsqueeze(-1)

    def protected(self) -> Tensor:
        """Slots ``(B, H, K)`` of a row's first and latest tokens, which always stay."""
        position, tokens = self.pages.field(POSITION), self.tokens[:, None, None]
        return (position < self.sink) | (position >= tokens - self.recent)
