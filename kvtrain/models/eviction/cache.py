"""The cache of eviction policies: slots of ragged length on pages, fields beside them, and what is kept for a row."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement, bookkeeping
from kvtrain.cache.state import StateStore
from kvtrain.kernels.paged_scores import paged_tiles
from kvtrain.models.eviction.config import Eviction

POSITION = "position"


class LayerShape(NamedTuple):
    """One layer of a model, as far as policies ask for it."""

    layer_idx: int
    num_layers: int
    num_query_heads: int
    num_heads: int  # of keys and values
    head_dim: int
    wide: torch.dtype  # of what is summed
    make_rotary: Callable[[], nn.Module]  # the host's rotary embedding


class EvictingCacheLayer(KVCacheLayer):
    """Keys (rotated) and values of one layer, of which a policy evicts some.

    Args:
        policy: Says which.
        shape: Of the layer.
        placement: Where tensors lie.

    Attributes:
        pages: Slots with ``position`` and the policy's fields.
        state: Of every row: tokens that this layer has seen, the latest queries if the policy looks back, and what else
            it keeps.
        secondary: What has left ``pages`` and is attended all the same, for policies that have such a store.
    """

    def __init__(self, policy: Eviction, shape: LayerShape, placement: Placement) -> None:
        self.policy, self.shape, self.num_heads = policy, shape, shape.num_heads
        self.cuts_prompts = policy.prompt == "dense"
        kinds = policy.slot_fields.items()
        fields = {name: shape.wide if kind is None else getattr(torch, kind) for name, kind in kinds}
        self.pages = PagedStore(
            shape.num_heads,
            {"keys": shape.head_dim, "values": shape.head_dim},
            policy.page_size,
            placement,
            policy.kv_bits,
            policy.max_slots(shape),
            slot_fields={POSITION: torch.int32, **fields},
        )
        self.state = StateStore(_state_shapes(policy, shape, placement), placement)
        self.secondary = policy.secondary_store(shape, placement)
        super().__init__(self.pages, self.state, *([] if self.secondary is None else [self.secondary]))

    @property
    def tokens(self) -> Tensor:
        """Tokens that have gone through this layer, ``(B,)``."""
        return self.state["tokens"]

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths if self.secondary is None else self.pages.lengths + self.secondary.lengths

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

    def remember_queries(self, query: Tensor, lse: Tensor, positions: Tensor) -> None:
        """Keep the latest queries of every row, where the policy looks back.

        Args:
            query: ``(B, H, n, D)``, scaled.
            lse: ``(B, H, n)``.
            positions: ``(B, n)``, -1 for padding, which stands before the real ones.
        """
        window = self.policy.query_window()
        if not window:
            return
        latest = slice(-window, None)
        query, lse, positions = query[:, :, latest], lse[:, :, latest], positions[:, latest]
        row, column = (positions >= 0).nonzero(as_tuple=True)
        place = positions[row, column] % window
        self.state["queries"][row, :, place] = query[row, :, column].to(self.state["queries"].dtype)
        self.state["lse"][row, :, place] = lse[row, :, column].to(self.state["lse"].dtype)

    def window_sums(self) -> Tensor:
        """What the queries that are remembered give to every slot, ``(B, H, K)``."""
        window, pages = self.policy.query_window(), self.pages
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
        return sums[pages.table.clamp(min=0)].flatten(2)

    def read_slots(self, name: str, slots: Tensor) -> Tensor:
        """Copies ``(B, H, n, channels)`` of slots ``(B, H, n)``; of those that heads do not own, of anything."""
        pages = self.pages.table.gather(2, slots // self.pages.page_size).clamp(min=0)
        return self.pages.unpack(name, self.pages.pool.slots[name][pages, slots % self.pages.page_size])

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
        return (position < self.policy.sink) | (position >= tokens - self.policy.recent)

    @torch.no_grad()
    @bookkeeping
    def evict(self, rows: Tensor) -> None:
        """Let the rows ``(B,)`` bool keep what the policy wants to keep."""
        victims = self.policy.evict_mask(self) & rows[:, None, None] & self.pages.live()
        self.policy.on_evict(self, victims)
        self.pages.evict(victims)

    def end_prompt(self, rows: Tensor, layers: Sequence[KVCacheLayer]) -> None:
        """See ``KVCacheLayer``."""
        if self.shape.layer_idx == 0:
            self.policy.on_prompt_end(rows, cast("list[EvictingCacheLayer]", layers))
        self.evict(rows)


def _state_shapes(policy: Eviction, shape: LayerShape, placement: Placement) -> dict[str, Any]:
    """What is kept for a row, as ``StateStore`` takes it."""
    shapes: dict[str, Any] = {"tokens": ((), torch.long), **policy.row_state(shape)}
    window = policy.query_window()
    if window:
        shapes["queries"] = ((shape.num_query_heads, window, shape.head_dim), placement.dtype)
        shapes["lse"] = ((shape.num_query_heads, window), shape.wide)
    return shapes
