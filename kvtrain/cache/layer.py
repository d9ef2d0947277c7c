"""What one layer of a cache is: transformers' layer, whose state lies in stores that know their bytes and rows."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvtrain.cache.rows import RowStore


class KVCacheLayer(CacheLayerMixin):
    """One layer's state, all of it in row stores and nothing on modules. Methods add how they write to it.

    Args:
        stores: Everything that the layer keeps.
    """

    cuts_prompts = False  # whether it keeps a prompt whole until ``end_prompt``
    has_fixed_step = True  # whether all shapes of a decoding step are known before it, once pages have been taken

    def __init__(self, *stores: RowStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stores = stores
        self.is_initialized = True

    @abstractmethod
    def kv_tokens(self) -> Tensor:
        """Entries kept, ``(B, H_kv)``."""

    def kv_bytes(self) -> int:
        """Bytes allocated, free pages included."""
        return sum(store.num_bytes() for store in self.stores)

    def end_prompt(self, rows: Tensor, layers: "Sequence[KVCacheLayer]") -> None:
        """Some rows have read a prompt to its end; layers with ``cuts_prompts`` cut it now.

        Args:
            rows: ``(B,)`` bool.
            layers: All of the cache, of which the lower ones have done so.
        """

    def check_rollback(self, tokens: Tensor, past: Tensor) -> None:
        """Say whether ``rollback`` with the same arguments can be done; layers that never can leave it as it is.

        Raises:
            ValueError: It cannot; the reason, and what to do.
        """
        raise ValueError(
            "this cache cannot be rolled back or cropped (assisted decoding does that): what it merged or dropped "
            "cannot come back; use snapshot_row and restore_row"
        )

    def rollback(self, tokens: Tensor, past: Tensor) -> None:
        """Forget the latest tokens of every row, as if they had never come; ``check_rollback`` has allowed it.

        Args:
            tokens: ``(B,)`` how many.
            past: ``(B,)`` tokens that each row has seen, these included.
        """
        self.check_rollback(tokens, past)

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        for store in self.stores:
            store.reset()

    def get_seq_length(self) -> int:
        """Refused: rows differ, and the cache as a whole counts."""
        raise ValueError("a layer has no length of its own; ask the cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Refused, as ``get_seq_length``."""
        raise ValueError("a layer has no length of its own; ask the cache")

    def get_max_length(self) -> int:
        """Refused, as ``get_seq_length``."""
        raise ValueError("a layer has no length of its own; ask the cache")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: stores know their shapes from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: kvtrain's attention writes through the layer's own methods."""
        raise ValueError("this cache serves kvtrain models alone; give other models their own cache")

    def offload(self) -> None:
        """Refused: pages are attended where they lie."""
        raise ValueError(
            "this cache cannot be offloaded; compress more, or set a byte budget and serve fewer rows at a time"
        )

    prefetch = offload
