"""Qwen3-MoE: Qwen3 with experts, in all layers or in some."""

from kvtrain.models.hosts.experts import ExpertsAdapter


class Qwen3MoEAdapter(ExpertsAdapter):
    """See ``HostAdapter``."""

    model_type = "qwen3_moe"
    query_key_norm = "head"


ADAPTER = Qwen3MoEAdapter()
