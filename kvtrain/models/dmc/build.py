"""Modules and caches of Dynamic Memory Compression."""

from torch import nn

from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.dmc.attention import DMCAttention
from kvtrain.models.dmc.cache import DMCCacheLayer
from kvtrain.models.dmc.config import DMC
from kvtrain.models.hosts import key_value_shape


class Builder(build.Builder[DMC]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> DMCAttention:
        """See ``build.Builder``."""
        return DMCAttention(host_attention, layer_idx, self.settings)

    def cache_layer(self, layer_idx: int, placement: Placement) -> DMCCacheLayer:
        """See ``build.Builder``."""
        shape, settings = key_value_shape(self.host_config, layer_idx), self.settings
        return DMCCacheLayer(*shape, placement, settings.window, settings.page_size)
