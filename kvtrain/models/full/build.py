"""Modules and caches of the identity method."""

from torch import nn

from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.full.attention import FullAttention
from kvtrain.models.full.cache import FullCacheLayer
from kvtrain.models.full.config import Full
from kvtrain.models.hosts import key_value_shape


class Builder(build.Builder[Full]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> FullAttention:
        """See ``build.Builder``."""
        return FullAttention(host_attention, layer_idx, self.settings.kv_bits)

    def cache_layer(self, layer_idx: int, placement: Placement) -> FullCacheLayer:
        """See ``build.Builder``."""
        return FullCacheLayer(*key_value_shape(self.host_config, layer_idx), placement, bits=self.settings.kv_bits)
