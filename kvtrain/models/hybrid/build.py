"""Modules and caches of hybrids."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.attention import HostAttention
from kvtrain.models.full_attention import FullAttention
from kvtrain.models.full_cache import build_layers
from kvtrain.models.hosts import key_value_shape
from kvtrain.models.hybrid.attention import LinearMixer
from kvtrain.models.hybrid.config import Hybrid
from kvtrain.models.hybrid.convert import adapt_state
from kvtrain.models.linear_state import LinearStateLayer


class Builder(build.Builder[Hybrid]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> HostAttention:
        """See ``build.Builder``."""
        if layer_idx in self.settings.chosen_layers(self.host_config):
            return LinearMixer(host_attention, layer_idx, self.settings)
        return FullAttention(host_attention, layer_idx)

    def cache_layers(
        self, placements: Mapping[int, Placement], page_size: int | None = None, **options: Any
    ) -> dict[int, KVCacheLayer]:
        """See ``build.Builder``; ``page_size`` is that of softmax layers."""
        self.refuse_options(options)
        slots = self.settings.page_size if page_size is None else page_size
        chosen = self.settings.chosen_layers(self.host_config)
        softmax = {layer: placement for layer, placement in placements.items() if layer not in chosen}
        shapes = {layer: key_value_shape(self.host_config, layer) for layer in softmax}
        layers = build_layers(shapes, softmax, slots)
        return layers | {layer: self._state(layer, placements[layer]) for layer in chosen}

    def _state(self, layer: int, placement: Placement) -> LinearStateLayer:
        head_dim = key_value_shape(self.host_config, layer)[1]
        return LinearStateLayer(int(self.host_config.num_attention_heads), head_dim, placement)

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``build.Builder``."""
        return adapt_state(self.settings, state, self.host_config)
