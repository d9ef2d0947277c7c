"""Modules and caches of eviction policies."""

from functools import partial

from torch import nn

from kvtrain.cache.rows import Placement
from kvtrain.kernels.dispatch import wide_dtype
from kvtrain.models import build
from kvtrain.models.eviction.attention import EvictingAttention
from kvtrain.models.eviction.cache import EvictingCacheLayer
from kvtrain.models.eviction.config import Policy
from kvtrain.models.eviction.slots import LayerShape
from kvtrain.models.hosts import host_adapter, whole_layers


class Builder(build.Builder[Policy]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> EvictingAttention:
        """See ``build.Builder``."""
        return EvictingAttention(host_attention, layer_idx, self.settings)

    def cache_layer(self, layer_idx: int, placement: Placement) -> EvictingCacheLayer:
        """See ``build.Builder``."""
        config, adapter = self.host_config, host_adapter(self.host_config)
        layers = whole_layers(config)  # the only ones that have something to share out
        shape = LayerShape(
            layers.index(layer_idx),
            len(layers),
            config.num_attention_heads,
            *adapter.key_value_shape(config, layer_idx),
            wide_dtype(placement.dtype),
            partial(adapter.rotary_embedding, config, layer_idx),
        )
        return EvictingCacheLayer(self.settings, shape, placement)
