"""What TransNormer keeps while it generates: a matrix a head, or one block of tokens. Neither grows with the text."""

import torch
from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.ring import RingStore
from kvtrain.cache.rows import Placement
from kvtrain.cache.state import StateStore
from kvtrain.kernels.block_attention import Past
from kvtrain.models.transnormer.config import TransNormerConfig


class NormCacheLayer(KVCacheLayer):
    """Sums of key-value products ``(H, D, D)`` of one linear layer, in at least float32.

    Half precision would lose tokens: at 8,192 of them a bfloat16 state is 3 to 10 % off.

    Args:
        num_heads: Heads, H.
        head_dim: Channels of a head, D.
        placement: Where tensors lie.
    """

    def __init__(self, num_heads: int, head_dim: int, placement: Placement) -> None:
        dtype = torch.promote_types(placement.dtype, torch.float32)
        self.sums = StateStore({"state": ((num_heads, head_dim, head_dim), dtype)}, placement)
        super().__init__(self.sums)

    @property
    def state(self) -> Tensor:
        """``(B, H, D, D)``."""
        return self.sums["state"]

    @state.setter
    def state(self, value: Tensor) -> None:
        self.sums["state"] = value

    def kv_tokens(self) -> Tensor:
        """Keys with values, in the cache's dtype, that would take the state's bytes."""
        rows, heads, head_dim, _ = self.state.shape
        pair = 2 * head_dim * self.sums.placement.dtype.itemsize
        return torch.full((rows, heads), self.state[:1, :1].nbytes // pair if rows else 0, device=self.state.device)


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
        return NormCacheLayer(heads, head_dim, placement)

    return [layer(index, placement) for index, placement in enumerate(placements)]
