"""Qwen2: Llama with biases in the projections of queries, keys and values."""

from kvtrain.models.hosts.base import HostAdapter


class Qwen2Adapter(HostAdapter):
    """See ``HostAdapter``."""

    model_type = "qwen2"
    slides_by_layer = True


ADAPTER = Qwen2Adapter()
