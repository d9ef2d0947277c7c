"""Why vLLM does not serve DMC."""

from transformers import PreTrainedConfig

from kvtrain.models.dmc.config import DMC
from kvtrain.models.paged_layers import ONE_TABLE, PagedLayer, PagedSupport, not_served


def _layers(settings: DMC, host_config: PreTrainedConfig) -> list[PagedLayer]:
    raise not_served("method 'dmc'", f"its heads have different lengths, and {ONE_TABLE}")


PAGED = PagedSupport(DMC, _layers)
