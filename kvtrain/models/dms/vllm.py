"""Why vLLM does not serve DMS."""

from transformers import PreTrainedConfig

from kvtrain.models.dms.config import DMS
from kvtrain.models.paged_layers import PagedLayer, PagedSupport, refuse


def _layers(settings: DMS, host_config: PreTrainedConfig) -> list[PagedLayer]:
    raise refuse("method 'dms'", "its heads have different lengths, and vLLM keeps one table of blocks for all of them")


PAGED = PagedSupport(DMS, _layers)
