"""Modules and caches of cross-layer sharing."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.hosts import host_adapter
from kvtrain.models.lckv.attention import SharedAttention
from kvtrain.models.lckv.cache import build_layers
from kvtrain.models.lckv.config import LCKV
from kvtrain.models.lckv.convert import adapt_state
from kvtrain.models.lckv.layer_schedule import LayerSchedule
from kvtrain.models.lckv.serving import serve


class Builder(build.Builder[LCKV]):
    """See ``build.Builder``."""

    def attention(self, host_attention: nn.Module, layer_idx: int) -> SharedAttention:
        """See ``build.Builder``."""
        return SharedAttention(host_attention, layer_idx, self.settings)

    def layers(self, layers: nn.ModuleList, rotary: nn.Module) -> LayerSchedule:
        """See ``build.Builder``."""
        return LayerSchedule(layers, rotary, self.settings, host_adapter(self.host_config), serve)

    def cache_layers(
        self, placements: Mapping[int, Placement], page_size: int | None = None, **options: Any
    ) -> dict[int, KVCacheLayer]:
        """See ``build.Builder``; ``sink`` and ``recent`` make a cache for endless generation.

        Raises:
            ValueError: There is another option, or ``page_size`` for an endless cache.
        """
        if unknown := sorted(set(options) - {"sink", "recent"}):
            raise ValueError(f"caches of method 'lckv' have no option {unknown[0]!r}; give sink and recent, or neither")
        places = [*placements.values()]  # of all layers: maps say which of them slide
        layers = build_layers(self.with_page_size(page_size).settings, self.host_config, places, **options)
        if page_size is not None and layers[0].endless is not None:
            raise ValueError("an endless cache is of constant size and has no pages; leave page_size out")
        return dict(enumerate(layers))

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``build.Builder``."""
        return adapt_state(self.settings, state, self.host_config)
