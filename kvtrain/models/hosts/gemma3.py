"""Gemma 3, its text decoder: norms on both sides of attention and MLP, and a rotary base for each type of layer."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from kvtrain.models.hosts.base import HostAdapter


class Gemma3Adapter(HostAdapter):
    """See ``HostAdapter``."""

    model_type = "gemma3_text"
    slides_by_layer = True
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    query_key_norm = "head"
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    served_by_vllm = False

    def embedding(self, embedding: nn.Module) -> nn.Module:
        """See ``HostAdapter``."""
        from kvtrain.models.modules import ScaledEmbedding

        return ScaledEmbedding(embedding)

    def norm(self, norm: nn.Module) -> nn.Module:
        """See ``HostAdapter``."""
        from kvtrain.models.modules import ZeroCenteredRMSNorm

        return ZeroCenteredRMSNorm(norm)

    def feed_forward(self, mlp: nn.Module, layer_idx: int) -> nn.Module:
        """See ``HostAdapter``."""
        from kvtrain.kernels.mlp import geglu
        from kvtrain.models.modules import GatedMLP

        return GatedMLP(mlp, geglu)

    def rotary_parameters(self, config: PreTrainedConfig, layer_idx: int) -> Mapping[str, Any]:
        """See ``HostAdapter``."""
        parameters: Mapping[str, Any] = config.rope_parameters[config.layer_types[layer_idx]]
        return parameters

    def decoder_rotary(self, rotary: nn.Module, config: PreTrainedConfig) -> nn.Module:
        """See ``HostAdapter``."""
        from kvtrain.models.modules import RotaryByLayerType

        first = {kind: config.layer_types.index(kind) for kind in config.layer_types}
        return RotaryByLayerType({kind: self.rotary_embedding(config, layer) for kind, layer in first.items()})

    def validate(self, config: PreTrainedConfig) -> None:
        """See ``HostAdapter``."""
        super().validate(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, name) is not None:
                raise ValueError(f"soft capping of logits is not supported; set {name}=None")
        if config.use_bidirectional_attention:
            raise ValueError("attention in both directions is not supported; set use_bidirectional_attention=False")


ADAPTER = Gemma3Adapter()
