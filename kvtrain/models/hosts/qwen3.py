"""Qwen3: every head of queries and keys is normalized."""

from kvtrain.models.hosts.base import HostAdapter


class Qwen3Adapter(HostAdapter):
    """See ``HostAdapter``."""

    model_type = "qwen3"
    query_key_norm = "head"
    slides_by_layer = True


ADAPTER = Qwen3Adapter()
