"""What every cache here is: transformers' ``Cache`` of layers that know their bytes and their rows."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class KVCacheLayer(CacheLayerMixin):
    """One layer's state. All of it is per row and lives here, never on modules.

    Attributes:
        seen: Positions that went by, padding included: the logical length that ``generate`` counts with.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer holds."""

    @abstractmethod
    def kv_tokens(self) -> Tensor:
        """Entries kept, ``(B, H_kv)``."""

    @abstractmethod
    def select_rows(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows, ``indices (B_new,)``."""

    def free_bytes(self) -> int:
        """Allocated bytes that hold nothing at present."""
        return 0

    def kv_bytes(self) -> int:
        """Bytes allocated, free pages included."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length and offset."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: stores start themselves at the first write."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: kvtrain's attention writes through the layer's own methods."""
        raise ValueError("this cache serves kvtrain models alone; give other models their own cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: rows change places, with all their state."""
        self.select_rows(beam_idx)


class KVCache(Cache):
    """A model's cache: one ``KVCacheLayer`` a layer. ``model.make_cache()`` builds it."""

    layers: list[KVCacheLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[KVCacheLayer]) -> None:
        super().__init__(layers=list(layers))

    def kv_bytes(self) -> int:
        """Bytes really allocated, over all layers."""
        return sum(layer.kv_bytes() for layer in self.layers)

    def free_bytes(self) -> int:
        """Those of ``kv_bytes`` that hold nothing at present (spare pages)."""
        return sum(layer.free_bytes() for layer in self.layers)

    def kv_tokens(self) -> Tensor:
        """Entries kept, ``(layers, B, H_kv)``."""
        return torch.stack([layer.kv_tokens() for layer in self.layers])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, for several returned sequences."""
        for layer in self.layers:
            rows = layer.kv_tokens()
            layer.select_rows(torch.arange(rows.shape[0], device=rows.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        for layer in self.layers:
            layer.select_rows(indices)

    def crop(self, *_: Any) -> None:
        """Refused: what was merged or dropped cannot come back.

        Raises:
            ValueError: Always.
        """
        raise ValueError("this cache cannot be cropped (assisted decoding needs that); use plain decoding")
