"""Llama, after which the others are modelled."""

from kvtrain.models.hosts.base import HostAdapter


class LlamaAdapter(HostAdapter):
    """See ``HostAdapter``."""

    model_type = "llama"


ADAPTER = LlamaAdapter()
