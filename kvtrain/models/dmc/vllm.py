"""Why vLLM does not serve DMC."""

from transformers import PreTrainedConfig

from kvtrain.models.dmc.config import DMC
from kvtrain.models.paged_layers import PagedLayer, PagedSupport, refuse


def _layers(settings: DMC, host_config: PreTrainedConfig) -> list[PagedLayer]:
    raise refuse("method 'dmc'", "its heads have different lengths, and vLLM keeps one table of blocks for all of them")


PAGED = PagedSupport(DMC, _layers)
