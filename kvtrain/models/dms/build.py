"""Modules and caches of Dynamic Memory Sparsification."""

from typing import Any

from torch import Tensor, nn

from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.dms.attention import DMSAttention
from kvtrain.models.dms.cache import DMSCacheLayer
from kvtrain.models.dms.config import DMS
from kvtrain.models.dms.convert import adapt_state
from kvtrain.models.hosts import key_value_shape


class Builder(build.Builder[DMS]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> DMSAttention:
        """See ``build.Builder``."""
        return DMSAttention(host_attention, layer_idx, self.settings)

    def layers(self, layers: nn.ModuleList, rotary: nn.Module) -> nn.ModuleList:
        """See ``build.Builder``; adapters read what enters a layer, and attention alone gets that normed."""
        if self.settings.decide_by == "adapter":
            for layer in layers:
                layer.register_forward_pre_hook(_hand_on_residual, with_kwargs=True)
        return layers

    def cache_layer(self, layer_idx: int, placement: Placement) -> DMSCacheLayer:
        """See ``build.Builder``."""
        shape, settings = key_value_shape(self.host_config, layer_idx), self.settings
        return DMSCacheLayer(*shape, placement, settings.window, settings.page_size, settings.kv_bits)

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``build.Builder``."""
        return adapt_state(self.settings, state, self.host_config)


def _hand_on_residual(
    _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's input once more by name: a host's layer hands names that it does not know on to its attention."""
    return args, {**kwargs, "residual": args[0] if args else kwargs["hidden_states"]}
