"""Modules and caches of the identity method."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.full.config import Full
from kvtrain.models.full_attention import FullAttention
from kvtrain.models.full_cache import build_layers
from kvtrain.models.hosts import key_value_shape


class Builder(build.Builder[Full]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> FullAttention:
        """See ``build.Builder``."""
        return FullAttention(host_attention, layer_idx, self.settings.kv_bits)

    def cache_layers(
        self, placements: Mapping[int, Placement], page_size: int | None = None, **options: Any
    ) -> dict[int, KVCacheLayer]:
        """See ``build.Builder``; pages have 32 slots where ``page_size`` is absent."""
        self.refuse_options(options)
        slots = 32 if page_size is None else page_size
        shapes = {layer: key_value_shape(self.host_config, layer) for layer in placements}
        return build_layers(shapes, placements, slots, self.settings.kv_bits)
