"""Attention over what a policy has kept, and what it shows the policy."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.cache.rows import bookkeeping
from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.attention_scores import AttentionTile, dense_tiles
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.paged_scores import paged_tiles
from kvtrain.kernels.quantization import read_back
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.eviction.blocks import Block, blocks_of
from kvtrain.models.eviction.cache import EvictingCacheLayer
from kvtrain.models.eviction.config import Policy
from kvtrain.models.eviction.observation import NewQueries, Observation
from kvtrain.models.eviction.slots import POSITION
from kvtrain.models.ordering import take_slots, take_tokens


class EvictingAttention(HostAttention):
    """The host's attention over the slots that are kept; there is no form without a cache.

    New tokens are attended, then the policy sees the probabilities, then the rows whose block is full evict.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        policy: What to keep.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, policy: Policy) -> None:
        super().__init__(host_attention, layer_idx)
        self.policy = policy

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``."""
        query, key, value = self.project(hidden_states, position_embeddings, context.parallel)
        layer = context.cache_layer(self.layer_idx)
        assert isinstance(layer, EvictingCacheLayer)
        output = self._serve(query, key, value, position_embeddings, context, layer)
        return self.project_out(output, context.parallel), None

    @bookkeeping
    def _serve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Angles,
        context: ForwardContext,
        layer: EvictingCacheLayer,
    ) -> Tensor:
        """New tokens, block by block, ``(B, H, n, D)``."""
        key, value = (read_back(states, self.policy.kv_bits) for states in (key, value))
        cos, sin = (angle.expand(query.shape[0], -1, -1) for angle in angles)
        blocks = blocks_of(self.policy, context)
        if len(blocks) == 1 and blocks[0].columns is None:
            new = NewQueries(query, (cos, sin), blocks[0].positions, self.scaling)
            return self._run_block(new, key, value, blocks[0], layer, context.single)
        outputs = torch.zeros_like(query)
        for block in blocks:
            assert block.columns is not None
            part = [take_slots(states, block.columns) for states in (query, key, value)]
            own_angles = take_tokens(cos, block.columns), take_tokens(sin, block.columns)
            new = NewQueries(part[0], own_angles, block.positions, self.scaling)
            output = self._run_block(new, part[1], part[2], block, layer)
            row, entry = block.valid.nonzero(as_tuple=True)
            outputs[row, :, block.columns[row, entry]] = output[row, :, entry]
        return outputs

    def _run_block(
        self,
        queries: NewQueries,
        key: Tensor,
        value: Tensor,
        block: Block,
        layer: EvictingCacheLayer,
        single: bool = False,
    ) -> Tensor:
        query = queries.rotated
        if query.shape[2] == 1:
            fields = {POSITION: block.positions.unsqueeze(1).expand(-1, self.num_key_value_heads, -1)}
            layer.append(key, value, fields, block.valid, single)
            output, lse = self.with_sinks(self._attend_kept(query, layer))
            with torch.no_grad():
                self._observe_kept(query, lse, block, layer, layer.pages.lengths.unsqueeze(-1))
        else:
            new = attention(query, key, value, documents=Documents(block.valid.long()), scale=self.scaling)
            output, lse = self.with_sinks(merge_attention([new, self._attend_kept(query, layer)]))
            with torch.no_grad():
                fields = self._observe_chunk(query, key, lse, block, layer)
            layer.append(key, value, fields, block.valid, single=False)
        with torch.no_grad():
            self.policy.observe_queries(layer, queries)
        layer.remember_queries(queries, lse, single)
        if block.evicting is not None:
            layer.evict(block.evicting)
        return output

    def _attend_kept(self, query: Tensor, layer: EvictingCacheLayer) -> tuple[Tensor, Tensor]:
        """All slots of both stores."""
        parts = [self.attend_pages(query, layer.pages)]
        if layer.secondary is not None and layer.secondary.table.shape[2]:
            parts.append(self.attend_pages(self.policy.secondary_query(layer, query), layer.secondary))
        return merge_attention(parts) if len(parts) > 1 else parts[0]

    def _observe_chunk(
        self, query: Tensor, key: Tensor, lse: Tensor, block: Block, layer: EvictingCacheLayer
    ) -> dict[str, Tensor]:
        """Show several new tokens' probabilities over what is kept and over themselves; fields of their own slots."""
        fields = layer.fresh_fields(block.positions)
        visible = layer.pages.lengths.unsqueeze(-1) + block.valid.cumsum(1).unsqueeze(1)  # (B, H_kv, n)
        self._observe_kept(query, lse, block, layer, visible)
        if self.policy.num_observed_queries != 0:
            latest, lse = (states[:, :, self._observed(query.shape[2])] for states in (query, lse))
            tiles = dense_tiles(latest, key, lse, self.scaling, positions=block.positions)
            self._observe(tiles, fields, visible)
        return fields

    def _observe(self, tiles: Iterator[AttentionTile], fields: Mapping[str, Tensor], visible: Tensor) -> None:
        latest = visible[..., self._observed(visible.shape[2])]
        for tile in tiles:
            self.policy.observe(Observation(tile, fields, latest))

    def _observed(self, num_queries: int) -> slice:
        """Which of so many queries the policy wants to see: the latest."""
        wanted = self.policy.num_observed_queries
        return slice(0 if wanted is None else max(0, num_queries - wanted), None)

    def _observe_kept(
        self, query: Tensor, lse: Tensor, block: Block, layer: EvictingCacheLayer, visible: Tensor
    ) -> None:
        """Show new tokens' probabilities over the slots that are kept, all of which they see."""
        if self.policy.num_observed_queries == 0 or not layer.pages.table.shape[2]:
            return
        latest, pages = self._observed(query.shape[2]), layer.pages
        tiles = paged_tiles(
            query[:, :, latest],
            pages.pool.slots["keys"],
            lse[:, :, latest],
            self.scaling,
            pages.table,
            pages.lengths,
            block.positions[:, latest],
            bits=pages.bits,
            layout=pages.layout(),
        )
        self._observe(tiles, pages.pool.slots, visible)
