"""How a ring is cut into pages that are as large as a block of a layer's other heads."""

import torch

from kvtrain.cache.ring import RingStore
from kvtrain.cache.rows import Placement
from kvtrain.inference.vllm.state_layout import StateLayout
from kvtrain.models.paged_layers import PagedLayer, Ring

# With one page a ring, a block would be as long as its window, and in the mean half of a block is empty; with many
# pages vLLM keeps many tables. Windows of 128 + 256 tokens make blocks of 128 where half of the heads are full.
_PIECES = 3
_ALIGNMENT = 32  # tokens, of which kernels want a block to be a multiple


def block_tokens(layer: PagedLayer) -> int:
    """Tokens of a block of the paged heads such that few pages hold the ring of the others."""
    assert layer.ring is not None
    ring = (layer.ring.sink + layer.ring.recent) * layer.ring.num_heads
    tokens = -(-ring // (_PIECES * layer.num_paged_heads))
    return -(-tokens // _ALIGNMENT) * _ALIGNMENT


def ring_store(ring: Ring, dtype: torch.dtype) -> RingStore:
    """The ring without rows."""
    return RingStore(ring.num_heads, ring.head_dim, ring.recent, ring.sink, Placement(dtype, torch.device("meta")))


def ring_layout(store: RingStore, layer: PagedLayer, block_size: int) -> StateLayout:
    """How a layer's ring lies in pages.

    Args:
        store: The ring.
        layer: Whose other heads lie in blocks.
        block_size: Tokens of a block.
    """
    assert layer.ring is not None
    block = 2 * block_size * layer.num_paged_heads * layer.ring.head_dim * store.placement.dtype.itemsize
    return StateLayout([store], block or None)
