"""From a host's layers to linear ones: weights that are new, and the call that converts a model."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvtrain.models.host import retrofit
from kvtrain.models.hosts import host_adapter, key_value_shape
from kvtrain.models.hybrid.config import Hybrid

NORM, GATE = "mixer_norm.weight", "mixer_gate.weight"


def convert_linear(
    host: PreTrainedModel, layers: Sequence[int] | Literal["half"] = "half", **settings: Any
) -> PreTrainedModel:
    """Let some layers of a model attend linearly, with the weights that they have; the result wants training.

    ``kvtrain.training.HybridModule`` trains one: first each linear layer matches what softmax attention gave in its
    place, then the whole model learns from the host's distribution.

    Args:
        host: A causal language model of a supported family; it stays as it was.
        layers: Which, counted from 0, or ``"half"``: every second one, the first among them.
        **settings: Of ``kvtrain.Hybrid``, such as ``decay="none"``.

    Returns:
        ``kvtrain.retrofit(host, kvtrain.Hybrid(linear_layers=layers, ...))``.

    Raises:
        ValueError: There is no such layer, or a setting is out of range; or as ``kvtrain.retrofit`` says.
    """
    return retrofit(host, Hybrid(linear_layers=layers, **settings))


def adapt_state(settings: Hybrid, state: dict[str, Tensor], host_config: PreTrainedConfig) -> dict[str, Tensor]:
    """A host's weights by name with norms of 1 and gates of a half in linear layers; those that are there stay."""
    adapted, hidden, heads = dict(state), int(host_config.hidden_size), int(host_config.num_attention_heads)
    for layer in settings.chosen_layers(host_config):
        prefix = host_adapter(host_config).attention_name(layer)
        head_dim = key_value_shape(host_config, layer)[1]
        like = state[f"{prefix}.q_proj.weight"]
        fresh = {NORM: like.new_ones(head_dim)}
        if settings.gate:
            fresh[GATE] = like.new_zeros(heads * head_dim, hidden)
        adapted |= {f"{prefix}.{name}": tensor for name, tensor in fresh.items() if f"{prefix}.{name}" not in state}
    return adapted
