"""TransNormer in vLLM: all that it keeps is of constant size."""

from transformers import PreTrainedConfig

from kvtrain.models.paged_layers import PagedLayer, PagedSupport
from kvtrain.models.transnormer.config import TransNormerConfig


def _layers(config: TransNormerConfig, _: PreTrainedConfig) -> list[PagedLayer]:
    if not config.causal:
        raise ValueError("a masked language model generates no text; open it with kvtrain.load")
    if any(not name.endswith("ForCausalLM") for name in config.architectures or ()):
        raise ValueError("a classifier generates no text; open it with kvtrain.load")
    return []


PAGED = PagedSupport(TransNormerConfig, _layers)
