"""OLMoE: experts in all layers, and norms over all queries and over all keys."""

from transformers import PreTrainedConfig

from kvtrain.models.hosts.experts import ExpertsAdapter


class OLMoEAdapter(ExpertsAdapter):
    """See ``HostAdapter``."""

    model_type = "olmoe"
    query_key_norm = "all"

    def validate(self, config: PreTrainedConfig) -> None:
        """See ``HostAdapter``."""
        super().validate(config)
        if config.clip_qkv is not None:
            raise ValueError("clipped queries, keys and values are not supported; set clip_qkv=None")


ADAPTER = OLMoEAdapter()
