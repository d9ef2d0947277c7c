"""A host's weights with adapters that decide nothing yet."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.models.dms.config import DMS
from kvtrain.models.hosts import host_adapter, key_value_shape, whole_layers

# Parameters of adapters, by their names in an attention, which are the released code's.
NORM, PROJECTION = "dms_proj_alpha_norm", "dms_proj_alpha"


def adapt_state(settings: DMS, state: dict[str, Tensor], host_config: PreTrainedConfig) -> dict[str, Tensor]:
    """A host's weights by name, with adapters that mark nothing; those that are there stay as they are."""
    if settings.decide_by != "adapter":
        return state
    adapted, hidden = dict(state), int(host_config.hidden_size)
    for layer in whole_layers(host_config):
        prefix = host_adapter(host_config).attention_name(layer)
        heads = key_value_shape(host_config, layer)[0]
        like = state[f"{prefix}.q_proj.weight"]
        dtype = torch.promote_types(like.dtype, torch.float32)
        fresh = {
            f"{prefix}.{NORM}.weight": like.new_ones(hidden, dtype=dtype),
            f"{prefix}.{PROJECTION}.weight": like.new_zeros(heads, hidden, dtype=dtype),
        }
        if f"{prefix}.q_proj.bias" in state:
            fresh[f"{prefix}.{PROJECTION}.bias"] = like.new_zeros(heads, dtype=dtype)
        adapted |= {name: tensor for name, tensor in fresh.items() if name not in state}
    return adapted
