"""Why vLLM does not serve DMS."""

from transformers import PreTrainedConfig

from kvtrain.models.dms.config import DMS
from kvtrain.models.paged_layers import ONE_TABLE, PagedLayer, PagedSupport, not_served


def _layers(settings: DMS, host_config: PreTrainedConfig) -> list[PagedLayer]:
    raise not_served("method 'dms'", f"its heads have different lengths, and {ONE_TABLE}")


PAGED = PagedSupport(DMS, _layers)
