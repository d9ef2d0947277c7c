"""A cache layer whose keys and values lie in one ragged paged store."""

from torch import Tensor

from kvtrain.cache.base import KVCacheLayer
from kvtrain.cache.store import PagedStore


class PagedCacheLayer(KVCacheLayer):
    """One layer on one store; methods add how they write to it, and state of their own.

    Args:
        num_heads: Key-value heads.
        page_size: Slots in a page.
    """

    def __init__(self, num_heads: int, page_size: int) -> None:
        super().__init__()
        self.store = PagedStore(num_heads, page_size)

    def tensors(self) -> list[Tensor]:
        """See ``KVCacheLayer``."""
        return self.store.tensors()

    def free_bytes(self) -> int:
        """See ``KVCacheLayer``."""
        return self.store.free_bytes()

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.store.lengths

    def select_rows(self, indices: Tensor) -> None:
        """See ``KVCacheLayer``."""
        self.store.select_rows(indices)

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        self.seen = 0
