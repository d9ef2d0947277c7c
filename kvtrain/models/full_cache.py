"""The cache that keeps everything, on pages."""

from collections.abc import Mapping

from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.models.hosts.base import KeyValueShape


class FullCacheLayer(KVCacheLayer):
    """All keys (rotated) and values of one layer; every head of a row has the same length.

    Args:
        pages: The store, which layers of the same form share: they have the same tokens, and therefore one table.
        layer_idx: Which of its keys and values are this layer's.
        accounts: Whether this layer accounts for the store; one of those that share it does.
    """

    def __init__(self, pages: PagedStore, layer_idx: int, accounts: bool) -> None:
        super().__init__(*[pages] * accounts)
        self.pages, self._accounts = pages, accounts
        self.names = _names(layer_idx)

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, keep: Tensor | None) -> None:
        """Keep keys and values ``(B, H, n, D)`` of new tokens; ``slots`` and ``keep`` as in ``PagedStore.write``."""
        self.pages.write(dict(zip(self.names, (keys, values), strict=True)), slots, keep)

    def check_rollback(self, tokens: Tensor, past: Tensor) -> None:
        """See ``KVCacheLayer``; nothing is ever dropped, so anything can go."""

    def rollback(self, tokens: Tensor, past: Tensor) -> None:
        """See ``KVCacheLayer``."""
        if self._accounts:
            self.pages.truncate(self.pages.lengths - tokens[:, None].to(self.pages.lengths.device))


def build_layers(
    shapes: Mapping[int, KeyValueShape], placements: Mapping[int, Placement], page_size: int, bits: int | None = None
) -> dict[int, KVCacheLayer]:
    """Empty cache layers of a model, by layer.

    Args:
        shapes: By layer, its key-value heads and the channels of each.
        placements: By layer, where its tensors lie.
        page_size: Slots in a page.
        bits: Of a channel in quantized pages; None keeps keys and values as they are.
    """
    alike: dict[tuple[KeyValueShape, str], list[int]] = {}
    for index, placement in placements.items():
        alike.setdefault((shapes[index], str(placement.device)), []).append(index)
    layers: dict[int, KVCacheLayer] = {}
    for (shape, _), members in alike.items():
        heads, head_dim = shape
        dims = {name: head_dim for index in members for name in _names(index)}
        placement = placements[members[0]].shared_by(len(members))
        pages = PagedStore(heads, dims, page_size, placement, bits)
        layers |= {index: FullCacheLayer(pages, index, index == members[0]) for index in members}
    return layers


def _names(layer_idx: int) -> tuple[str, str]:
    """Of one layer's keys and values in a store."""
    return f"keys.{layer_idx}", f"values.{layer_idx}"
