"""State of constant size as bytes: which of a row's bytes belong to which tensor, and into how many pages they go."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.cache.base import KVCache
from kvtrain.cache.state import StateStore
from kvtrain.models.registry import own_model_class

# Stores count a row's tokens under this name; an engine knows them, and so no page holds them.
_COUNTER = "tokens"
_ALIGNMENT = 8  # bytes, of the widest element


class Part(NamedTuple):
    """One tensor of a row.

    Attributes:
        store: Where it is an item.
        name: Of the item.
        shape: Of one row.
        dtype: Of its elements.
        begin: Its first byte.
        end: The byte behind its last one.
    """

    store: StateStore
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


class StateLayout:
    """The bytes of a row in some stores, one tensor after the other.

    Args:
        stores: Whose rows lie in pages.
        page_bytes: Of a page; None for a single one that holds everything.

    Attributes:
        num_bytes: Of a row.
        num_pages: Of a row.
    """

    def __init__(self, stores: Sequence[StateStore], page_bytes: int | None = None) -> None:
        self.stores = list(stores)
        self._parts = list(_parts(self.stores))
        self.num_bytes = _aligned(self._parts[-1].end)
        self.num_pages = 1 if page_bytes is None else -(-self.num_bytes // page_bytes)

    @property
    def piece_bytes(self) -> int:
        """Bytes of a row in each of its pages."""
        return _aligned(-(-self.num_bytes // self.num_pages))

    def open(self, rows: Tensor, past: Tensor) -> None:
        """Let the stores lie in rows of bytes, which they then change.

        Args:
            rows: ``(B, num_pages * piece_bytes)`` uint8.
            past: ``(B,)`` tokens that each row has seen; without any its bytes are whatever was there, and cleared.
        """
        rows.view(torch.int64).masked_fill_(past[:, None] == 0, 0)  # eight bytes at a time
        for store in self.stores:
            own = {
                part.name: rows[:, part.begin : part.end].view(part.dtype).view(-1, *part.shape)
                for part in self._parts
                if part.store is store
            }
            store.lie_in(own | {name: past.clone() for name in store.shapes if name == _COUNTER})


def model_layout(config: PreTrainedConfig, dtype: torch.dtype) -> StateLayout:
    """How all that a model of our own keeps of a row lies in one page.

    Args:
        config: Of the model.
        dtype: That it is served in.
    """
    with torch.device("meta"):
        model = own_model_class(config)(config).to(dtype)
    return cache_layout(model.make_cache())


def cache_layout(cache: KVCache) -> StateLayout:
    """The same of a cache, whose stores it opens.

    Args:
        cache: Of constant size a row.
    """
    stores = [store for store in cache.stores if isinstance(store, StateStore)]
    assert len(stores) == len(cache.stores), "a cache that grows has no page of constant size"
    return StateLayout(stores)


def _parts(stores: Sequence[StateStore]) -> Iterator[Part]:
    begin = 0
    for store in stores:
        for name, (shape, dtype) in store.shapes.items():
            if name != _COUNTER:
                end = begin + prod(shape) * dtype.itemsize
                yield Part(store, name, shape, dtype, begin, end)
                begin = _aligned(end)


def _aligned(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
