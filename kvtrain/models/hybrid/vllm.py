"""Hybrids in vLLM: not served."""

from transformers import PreTrainedConfig

from kvtrain.models.hybrid.config import Hybrid
from kvtrain.models.paged_layers import PagedLayer, PagedSupport, not_served


def _layers(settings: Hybrid, _: PreTrainedConfig) -> list[PagedLayer]:
    raise not_served("a hybrid", "its linear layers keep a state, and no blocks")


PAGED = PagedSupport(Hybrid, _layers)
