"""DuoAttention in vLLM: full heads in its blocks, streaming heads in a ring of constant size."""

from transformers import PreTrainedConfig

from kvtrain.models.duo.config import Duo
from kvtrain.models.hosts import common_key_value_shape
from kvtrain.models.paged_layers import PagedLayer, PagedSupport, Ring, not_served


def _layers(settings: Duo, host_config: PreTrainedConfig) -> list[PagedLayer]:
    if settings.full_heads is None:
        raise ValueError("gates are fractions yet; run kvtrain export, which rounds them")
    for name in ("compensation", "kv_bits"):
        if getattr(settings, name):
            raise not_served(name)
    heads, head_dim = common_key_value_shape(host_config)
    counts = [len(chosen) for chosen in settings.full_heads]
    if len(set(counts)) > 1:
        listed = ", ".join(map(str, counts))
        raise ValueError(
            f"full_heads has {listed} heads in layers {', '.join(map(str, range(len(counts))))}: vLLM pads all layers "
            "to the largest and nothing is saved; round with equal counts, or use kvtrain generate"
        )
    full = counts[0]
    ring = Ring(heads - full, head_dim, settings.sink, settings.recent) if full < heads else None
    return [PagedLayer(layer, full, ring=ring) for layer in range(len(counts))]


PAGED = PagedSupport(Duo, _layers)
