"""A whole family in one file, for the test that plants it: Llama, with other names for all its parts."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from kvtrain.models.hosts.base import HostAdapter

# The end of a module's name as Llama has it, and as this family does.
RENAMED = {
    ".self_attn.": ".mixer.",
    ".mlp.": ".feed_forward.",
    ".input_layernorm.": ".mixer_norm.",
    ".post_attention_layernorm.": ".feed_forward_norm.",
    "model.norm.": "model.last_norm.",
}


class PlantedConfig(LlamaConfig):
    model_type = "planted"


class PlantedLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mixer, self.feed_forward = self._modules.pop("self_attn"), self._modules.pop("mlp")
        self.mixer_norm = self._modules.pop("input_layernorm")
        self.feed_forward_norm = self._modules.pop("post_attention_layernorm")

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mixer(hidden_states=self.mixer_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class PlantedModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            self.layers[layer_idx] = PlantedLayer(config, layer_idx)
        self.last_norm = self._modules.pop("norm")
        self.post_init()

    @property
    def norm(self):
        """Where the forward pass, which is Llama's, looks for it."""
        return self.last_norm


class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = PlantedModel(config)
        self.post_init()


class PlantedAdapter(HostAdapter):
    model_type = "planted"
    final_norm = "last_norm"
    norms = ("mixer_norm", "feed_forward_norm")
    input_norm = "mixer_norm"
    attention = "mixer"
    mlp = "feed_forward"


ADAPTER, FAMILY = PlantedAdapter(), (PlantedConfig, PlantedForCausalLM)
