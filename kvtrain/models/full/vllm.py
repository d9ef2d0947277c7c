"""A full cache in vLLM: its own."""

from transformers import PreTrainedConfig

from kvtrain.models.full.config import Full
from kvtrain.models.paged_layers import PagedLayer, PagedSupport, not_served, whole_layers


def _layers(settings: Full, host_config: PreTrainedConfig) -> list[PagedLayer]:
    if settings.kv_bits is not None:
        raise not_served("kv_bits")
    return whole_layers(host_config)


PAGED = PagedSupport(Full, _layers)
