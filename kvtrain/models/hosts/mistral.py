"""Mistral, built as Llama is."""

from kvtrain.models.hosts.base import HostAdapter


class MistralAdapter(HostAdapter):
    """See ``HostAdapter``."""

    model_type = "mistral"


ADAPTER = MistralAdapter()
