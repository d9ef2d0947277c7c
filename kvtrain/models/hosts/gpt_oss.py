"""gpt-oss: experts with biases and a clamped gate, and attention whose softmax has a learned sink."""

from kvtrain.models.hosts.experts import ExpertsAdapter


class GptOssAdapter(ExpertsAdapter):
    """See ``HostAdapter``."""

    model_type = "gpt_oss"
    attention_sinks = True
    slides_by_layer = True
    served_by_vllm = False
    router = "router"
    gives_weights = True
    stored_projections = None


ADAPTER = GptOssAdapter()
