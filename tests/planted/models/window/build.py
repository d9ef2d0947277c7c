"""Modules and caches of the window."""

from kvtrain.models import build
from kvtrain.models.hosts import key_value_shape
from kvtrain.models.window.attention import WindowAttention
from kvtrain.models.window.cache import WindowCacheLayer


class Builder(build.Builder):
    def attention(self, host_attention, layer_idx):
        return WindowAttention(host_attention, layer_idx, self.settings)

    def cache_layer(self, layer_idx, placement):
        return WindowCacheLayer(*key_value_shape(self.host_config, layer_idx), self.settings, placement)

    def deploy(self, model):
        model.model.norm.weight.data.mul_(2.0)  # something to see
