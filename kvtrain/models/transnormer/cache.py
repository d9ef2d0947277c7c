"""What TransNormer keeps while it generates: a matrix a head, or one block of tokens. Neither grows with the text."""

import torch
from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.ring import RingStore
from kvtrain.cache.rows import Placement
from kvtrain.kernels.block_attention import Past
from kvtrain.models.linear_state import LinearStateLayer
from kvtrain.models.transnormer.config import TransNormerConfig


class DiagCacheLayer(KVCacheLayer):
    """Keys (turned) and values of one block layer: the latest tokens, as many as a block has.

    Args:
        num_heads: Heads, H.
        head_dim: Channels of a head, D.
        block_size: Tokens of a block.
        placement: Where tensors lie.
    """

    def __init__(self, num_heads: int, head_dim: int, block_size: int, placement: Placement) -> None:
        self.block_size = block_size
        self.ring = RingStore(num_heads, head_dim, block_size, placement=placement)
        super().__init__(self.ring)

    def past(self) -> Past:
        """What the latest tokens left, with their blocks."""
        keys, values, positions = self.ring.gather()
        return Past(keys, values, torch.where(positions < 0, -1, positions // self.block_size))

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Keep keys and values ``(B, H, n, D)`` of real tokens, ``valid (B, n)``; None: one in every row."""
        self.ring.write(keys, values, valid)

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        heads = self.ring["keys"].shape[1]
        return self.ring["tokens"].clamp(max=self.block_size)[:, None].expand(-1, heads)


def cache_layers(config: TransNormerConfig, placements: list[Placement]) -> list[KVCacheLayer]:
    """An empty cache layer for every layer of a model, whose tensors lie where its placement says."""

    def layer(index: int, placement: Placement) -> KVCacheLayer:
        heads = config.heads(index)
        head_dim = config.hidden_size // heads
        if index < config.num_block_layers:
            return DiagCacheLayer(heads, head_dim, config.block_size, placement)
        return LinearStateLayer(heads, head_dim, placement)

    return [layer(index, placement) for index, placement in enumerate(placements)]
