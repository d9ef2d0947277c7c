"""Layers that share keys and values in vLLM: readers of another layer's blocks."""

from transformers import PreTrainedConfig

from kvtrain.models.hosts import key_value_shapes
from kvtrain.models.lckv.config import LCKV
from kvtrain.models.paged_layers import PagedLayer, PagedSupport, not_served


def _layers(settings: LCKV, host_config: PreTrainedConfig) -> list[PagedLayer]:
    keys, values = settings.maps(host_config.num_hidden_layers)
    if any(keys.is_cyclic(layer) for layer in range(keys.depth)):
        raise ValueError(
            f"kv_map {settings.kv_map!r} reads keys from above, which takes iteration, and vLLM runs its layers once; "
            "serve it with kvtrain, or retrofit with a map that reads from below, such as 'cla2'"
        )
    if settings.mask_all_diagonals:
        raise ValueError("mask_all_diagonals is not served by vLLM, whose tokens see themselves; use kvtrain generate")
    if values.sources != keys.sources:
        raise not_served("value_map", "keys and values of one layer lie in one block")
    if settings.residual:
        raise not_served("residual")
    heads = [heads for heads, _ in key_value_shapes(host_config)]
    windows = [settings.sliding_window if sliding else None for sliding in keys.sliding]
    return [PagedLayer(*layer) for layer in zip(keys.sources, heads, windows, strict=True)]


PAGED = PagedSupport(LCKV, _layers)
