"""The cache of eviction policies."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement, bookkeeping
from kvtrain.cache.state import StateStore
from kvtrain.models.eviction.config import Policy
from kvtrain.models.eviction.slots import POSITION, LayerShape, LayerSlots


class EvictingCacheLayer(LayerSlots):
    """Slots of one layer, of which a policy evicts some.

    Args:
        policy: Says which.
        shape: Of the layer.
        placement: Where tensors lie.
    """

    has_fixed_step = False  # how many slots leave, and from which pages, is asked in every step

    def __init__(self, policy: Policy, shape: LayerShape, placement: Placement) -> None:
        self.policy, self.cuts_prompts = policy, policy.prompt == "dense"
        kinds = policy.slot_fields.items()
        fields = {name: shape.wide if kind is None else getattr(torch, kind) for name, kind in kinds}
        pages = PagedStore(
            shape.num_heads,
            {"keys": shape.head_dim, "values": shape.head_dim},
            policy.page_size,
            placement,
            policy.kv_bits,
            policy.max_slots(shape),
            slot_fields={POSITION: torch.int32, **fields},
        )
        state = StateStore(_state_shapes(policy, shape, placement), placement)
        secondary = policy.secondary_store(shape, placement, pages)
        super().__init__(shape, pages, state, secondary, policy.query_window(), policy.sink, policy.recent)

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
            self.policy.on_prompt_end(rows, cast("list[LayerSlots]", layers))
        self.evict(rows)


def _state_shapes(policy: Policy, shape: LayerShape, placement: Placement) -> dict[str, Any]:
    """What is kept for a row, as ``StateStore`` takes it."""
    shapes: dict[str, Any] = {"tokens": ((), torch.long), **policy.row_state(shape)}
    window = policy.query_window()
    if window:
        shapes["queries"] = ((shape.num_query_heads, window, shape.head_dim), placement.dtype)
        shapes["lse"] = ((shape.num_query_heads, window), shape.wide)
    return shapes
