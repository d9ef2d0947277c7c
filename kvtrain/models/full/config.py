"""Settings of the identity method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvtrain.models.method import Method, key_value_shape

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from kvtrain.cache.rows import Placement
    from kvtrain.models.full.cache import FullCacheLayer


@dataclass(frozen=True)
class Full(Method):
    """Keep every key and value: the host as it was, on kvtrain's pages and kernels."""

    name: ClassVar[str] = "full"

    def attention(self, host_attention: "nn.Module", layer_idx: int) -> "nn.Module":
        """See ``Method.attention``."""
        from kvtrain.models.full.attention import FullAttention

        return FullAttention(host_attention, layer_idx)

    def cache_layer(self, layer_idx: int, host_config: "PreTrainedConfig", placement: "Placement") -> "FullCacheLayer":
        """See ``Method.cache_layer``."""
        from kvtrain.models.full.cache import FullCacheLayer

        return FullCacheLayer(*key_value_shape(host_config), placement)
