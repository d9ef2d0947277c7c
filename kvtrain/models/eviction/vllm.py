"""Eviction in vLLM: a window with sinks fits into a ring, whatever a policy chooses by what it has seen does not."""

from dataclasses import replace

from transformers import PreTrainedConfig

from kvtrain.models.eviction.config import Eviction, Policy
from kvtrain.models.eviction.policies.streaming import StreamingLLM
from kvtrain.models.hosts import common_key_value_shape
from kvtrain.models.paged_layers import ONE_TABLE, PagedLayer, PagedSupport, Ring, not_served


def _layers(settings: Policy, host_config: PreTrainedConfig) -> list[PagedLayer]:
    """A token sees what was kept before it, and itself, and then one of them leaves."""
    if not isinstance(settings, Eviction):
        raise not_served(f"method {settings.name!r}", "vLLM keeps keys and values as they are")
    if not isinstance(settings, StreamingLLM):
        raise not_served(f"method {settings.name!r}", f"its heads drop different tokens, and {ONE_TABLE}")
    if settings.kv_bits is not None:
        raise not_served("kv_bits")
    plain = StreamingLLM(budget=settings.budget, sink=settings.sink, prompt="blocks", page_size=settings.page_size)
    if isinstance(settings.budget, float) or replace(settings, recent=0) != plain:
        raise ValueError(
            f"{settings.described_cache()}: vLLM serves streamingllm with windows that move with every token and are "
            "alike everywhere; give it a budget in tokens, prompt='blocks' and every=1, or use kvtrain generate"
        )
    heads, head_dim = common_key_value_shape(host_config)
    ring = Ring(heads, head_dim, settings.sink, settings.budget - settings.sink + 1)
    return [PagedLayer(layer, 0, ring=ring) for layer in range(host_config.num_hidden_layers)]


PAGED = PagedSupport(Policy, _layers)
