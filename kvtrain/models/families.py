"""The families that can be hosts, and what their retrofitted classes are called."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HOSTS = ("llama", "mistral", "olmo2", "qwen2", "qwen3")


def retrofitted_name(host_name: str) -> str:
    """``KVLlamaForCausalLM`` for ``LlamaForCausalLM``."""
    return f"KV{host_name}"


def retrofitted_names() -> dict[str, str]:
    """The name of every retrofitted class by its host's ``model_type``."""
    return {host: retrofitted_name(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[host]) for host in HOSTS}
