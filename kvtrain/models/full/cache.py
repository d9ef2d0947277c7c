"""The cache that keeps everything, on pages."""

import torch
from torch import Tensor

from kvtrain.cache.paged import PagedCacheLayer


class FullCacheLayer(PagedCacheLayer):
    """All keys (rotated) and values of one layer; every head of a row has the same length.

    Args:
        num_heads: Key-value heads.
        page_size: Slots in a page.
    """

    def __init__(self, num_heads: int, page_size: int = 32) -> None:
        super().__init__(num_heads, page_size)

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        """Keep the keys and values ``(B, H, n, D)`` of real tokens, ``valid (B, n)``."""
        keep = valid[:, None].expand(keys.shape[:3])
        lengths = self.store.lengths if self.store.num_rows else keep.new_zeros(keys.shape[:2], dtype=torch.long)
        self.store.write(keys, values, lengths.unsqueeze(-1) + keep.cumsum(-1) - 1, keep)
        self.seen += keys.shape[2]
