"""OLMo2: norms behind attention and MLP instead of before them, and norms over all queries and over all keys."""

from kvtrain.models.hosts.base import HostAdapter


class OLMo2Adapter(HostAdapter):
    """See ``HostAdapter``."""

    model_type = "olmo2"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    input_norm = None
    query_key_norm = "all"


ADAPTER = OLMo2Adapter()
