"""A family whose layers differ in key-value heads, in one file, for the test that plants it."""

import copy

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from kvtrain.models.hosts.base import HostAdapter


class UnevenConfig(LlamaConfig):
    model_type = "uneven"
    key_value_heads: list[int] | None = None


class UnevenForCausalLM(LlamaForCausalLM):
    config_class = UnevenConfig

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.model.layers):
            own = copy.copy(config)
            own.num_key_value_heads = config.key_value_heads[layer_idx]
            layer.self_attn = LlamaAttention(own, layer_idx)
            layer.self_attn.config = config
        self.post_init()


class UnevenAdapter(HostAdapter):
    model_type = "uneven"

    def key_value_shape(self, config, layer_idx):
        return config.key_value_heads[layer_idx], config.head_dim


ADAPTER, FAMILY = UnevenAdapter(), (UnevenConfig, UnevenForCausalLM)
