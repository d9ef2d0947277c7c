"""Families of hosts: every file here that exports ``ADAPTER`` is one."""

import functools

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvtrain.models.discovery import exported
from kvtrain.models.hosts.base import HostAdapter, KeyValueShape


@functools.cache
def host_adapters() -> dict[str, HostAdapter]:
    """The adapters of all families by ``model_type``."""
    return {adapter.model_type: adapter for adapter in exported(__name__, "ADAPTER", folders=False)}


def host_adapter(host_config: PreTrainedConfig) -> HostAdapter:
    """The adapter of a host's family.

    Raises:
        ValueError: There is none.
    """
    adapters, family = host_adapters(), host_config.model_type
    if family not in adapters:
        raise ValueError(f"hosts of type {family!r} are not supported; kvtrain retrofits {', '.join(adapters)}")
    return adapters[family]


def key_value_shape(host_config: PreTrainedConfig, layer_idx: int) -> KeyValueShape:
    """Key-value heads of a host's layer, and the channels of each."""
    return host_adapter(host_config).key_value_shape(host_config, layer_idx)


def windows(host_config: PreTrainedConfig) -> dict[int, int]:
    """By layer, of a host's layers that see a window alone: so many of the latest tokens."""
    adapter = host_adapter(host_config)
    found = {layer: adapter.window(host_config, layer) for layer in range(host_config.num_hidden_layers)}
    return {layer: window for layer, window in found.items() if window is not None}


def whole_layers(host_config: PreTrainedConfig) -> list[int]:
    """A host's layers that see every token; they are the ones that methods act on."""
    slide = windows(host_config)
    return [layer for layer in range(host_config.num_hidden_layers) if layer not in slide]


def key_value_shapes(host_config: PreTrainedConfig) -> list[KeyValueShape]:
    """``key_value_shape`` of every layer."""
    return [key_value_shape(host_config, layer_idx) for layer_idx in range(host_config.num_hidden_layers)]


def common_key_value_shape(host_config: PreTrainedConfig) -> KeyValueShape:
    """``key_value_shape`` of all layers together, for what cannot tell them apart.

    Raises:
        ValueError: Layers differ.
    """
    shapes = sorted(set(key_value_shapes(host_config)))
    if len(shapes) > 1:
        found = ", ".join(f"{heads} x {head_dim}" for heads, head_dim in shapes)
        raise ValueError(
            f"layers of this host differ in key-value heads x channels ({found}), and this treats them alike; take a "
            "host whose layers have the same, or a method that looks at every layer by itself"
        )
    return shapes[0]


def retrofitted_name(host_name: str) -> str:
    """``KVLlamaForCausalLM`` for ``LlamaForCausalLM``."""
    return f"KV{host_name}"


def retrofitted_names() -> dict[str, str]:
    """The name of every retrofitted class by its host's ``model_type``, of families that this transformers knows."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {family: retrofitted_name(known[family]) for family in host_adapters() if family in known}
