"""The cache that keeps everything, on pages."""

from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement


class FullCacheLayer(KVCacheLayer):
    """All keys (rotated) and values of one layer; every head of a row has the same length.

    Args:
        num_heads: Key-value heads.
        head_dim: Channels of a head.
        placement: Where tensors lie.
        page_size: Slots in a page.
        bits: Of a channel in quantized pages; None keeps keys and values as they are.
    """

    def __init__(
        self, num_heads: int, head_dim: int, placement: Placement, page_size: int = 32, bits: int | None = None
    ) -> None:
        self.pages = PagedStore(num_heads, {"keys": head_dim, "values": head_dim}, page_size, placement, bits)
        super().__init__(self.pages)

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        """Keep the keys and values ``(B, H, n, D)`` of real tokens, ``valid (B, n)``."""
        self.pages.append({"keys": keys, "values": values}, valid)

    def check_rollback(self, tokens: Tensor, past: Tensor) -> None:
        """See ``KVCacheLayer``; nothing is ever dropped, so anything can go."""

    def rollback(self, tokens: Tensor, past: Tensor) -> None:
        """See ``KVCacheLayer``."""
        self.pages.truncate(self.pages.lengths - tokens[:, None].to(self.pages.lengths.device))
