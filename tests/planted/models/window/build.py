"""Modules and caches of the window."""

from kvtrain.models import build
from kvtrain.models.hosts import key_value_shape
from kvtrain.models.weights import StoredWeights
from kvtrain.models.window.attention import WindowAttention
from kvtrain.models.window.cache import WindowCacheLayer


class Builder(build.Builder):
    def attention(self, host_attention, layer_idx):
        return WindowAttention(host_attention, layer_idx, self.settings)

    def cache_layer(self, layer_idx, placement):
        return WindowCacheLayer(*key_value_shape(self.host_config, layer_idx), self.settings, placement)

    def deploy(self, weights):
        doubled = "model.norm.weight"  # something to see
        return self.settings, StoredWeights(
            {name: name for name in weights}, lambda name: weights[name] * (2.0 if name == doubled else 1.0)
        )
