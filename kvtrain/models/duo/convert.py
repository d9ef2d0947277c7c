"""Surgery on gated models: gates put in, rounded, and the heads of every layer sorted."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvtrain.models.duo.attention import GatedAttention, RoundedAttention
from kvtrain.models.duo.config import Duo
from kvtrain.models.duo.gates import HARD_CONCRETE_START, by_layer, choose_full_heads, gate_values
from kvtrain.models.hosts import host_adapter, key_value_shape, whole_layers
from kvtrain.models.hosts.base import QUERY_KEY_NORMS
from kvtrain.models.weights import StoredWeights


def adapt_state(settings: Duo, state: dict[str, Tensor], host_config: PreTrainedConfig) -> dict[str, Tensor]:
    """A host's weights by name with open gates, or with the heads that ``full_heads`` names sorted to the front."""
    adapted, start = dict(state), HARD_CONCRETE_START if settings.gates == "hard_concrete" else 1.0
    for layer in whole_layers(host_config):
        prefix = f"{host_adapter(host_config).attention_name(layer)}."
        if settings.full_heads is None:
            heads, _ = key_value_shape(host_config, layer)
            adapted[f"{prefix}gates"] = torch.full((heads,), start)
            continue
        for name in [name for name in state if name.startswith(prefix)]:
            part = name.removeprefix(prefix)
            adapted[name] = sort_heads(part, state[name], settings.full_heads[layer], host_config, layer)
    return adapted


def sort_heads(name: str, tensor: Tensor, full: Sequence[int], host_config: PreTrainedConfig, layer_idx: int) -> Tensor:
    """A weight or bias of an attention with full heads first, then streaming ones, each in their old order.

    Args:
        name: In the attention: ``q_proj.weight``, ``k_proj.bias``, ``sinks`` ...
        tensor: The parameter.
        full: Key-value heads that keep everything.
        host_config: The host's configuration.
        layer_idx: Whose attention it is.
    """
    heads, head_dim = key_value_shape(host_config, layer_idx)
    order = [*full, *(head for head in range(heads) if head not in full)]
    module, _, kind = name.partition(".")
    grouped = host_config.num_attention_heads // heads if module in ("q_proj", "o_proj", "q_norm", "sinks") else 1
    size = grouped * (1 if module == "sinks" else head_dim)
    rows = (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()
    if module == "o_proj":  # whose outputs, and so its bias, are no heads
        return nn.Parameter(tensor[:, rows].detach()) if kind == "weight" else tensor
    if module in QUERY_KEY_NORMS and host_adapter(host_config).query_key_norm == "head":  # one norm for every head
        return tensor
    return nn.Parameter(tensor[rows].detach())


def round_state(
    settings: Duo, weights: Mapping[str, Tensor], host_config: PreTrainedConfig
) -> tuple[Duo, Mapping[str, Tensor]]:
    """As ``round_gates`` of a model that is not in memory: settings and weights by name, sorted as they are read."""
    if settings.full_heads is not None:
        return settings, weights
    adapter = host_adapter(host_config)
    prefixes = {layer: f"{adapter.attention_name(layer)}." for layer in whole_layers(host_config)}
    gates = torch.stack([gate_values(weights[f"{prefix}gates"], settings.gates) for prefix in prefixes.values()])
    full_heads = by_layer(choose_full_heads(gates, settings.sparsity), host_config)
    owners = {name: layer for layer, prefix in prefixes.items() for name in weights if name.startswith(prefix)}

    def read(name: str) -> Tensor:
        layer = owners.get(name)
        if layer is None:
            return weights[name]
        part = name.removeprefix(prefixes[layer])
        return sort_heads(part, weights[name], full_heads[layer], host_config, layer)

    gated = {f"{prefix}gates" for prefix in prefixes.values()}
    return settings.rounded(full_heads), StoredWeights({name: name for name in weights if name not in gated}, read)


def gates_of(model: PreTrainedModel) -> Tensor:
    """Gates ``(layers, H_kv)`` as they would be used in evaluation, without gradient, of the layers that have some.

    Raises:
        ValueError: The model has none.
    """
    gated = gated_attention(model)
    if not gated:
        raise ValueError("this model has no gates; retrofit one with kvtrain.Duo()")
    return torch.stack([attention.gate_values().detach().float().cpu() for attention in gated])


def gated_attention(model: nn.Module) -> list[GatedAttention]:
    """The attention of every layer, where heads have gates."""
    return [module for module in model.modules() if isinstance(module, GatedAttention)]


@torch.no_grad()
def round_gates(model: Any, settings: Duo, sparsity: float, gates: Tensor | None = None) -> None:
    """Round a gated model in place: it keeps its weights, sorted, and gets attention that a cache serves.

    Args:
        model: A model with gates.
        settings: Its method.
        sparsity: Share of streaming heads, of all layers together.
        gates: ``(layers, H_kv)``, such as those of a published pattern or of ``kvtrain.models.duo.scores``, in place
            of the model's own.

    Raises:
        ValueError: The model is rounded already, or the gates do not fit it.
    """
    own = gates_of(model)
    gates = own if gates is None else gates
    if gates.shape != own.shape:
        raise ValueError(f"gates are (layers, key-value heads) = {tuple(own.shape)}, not {tuple(gates.shape)}")
    rounded = settings.rounded(by_layer(choose_full_heads(gates, sparsity), model.config.host_config))
    assert rounded.full_heads is not None
    for attention in gated_attention(model):
        full = rounded.full_heads[attention.layer_idx]
        for name, parameter in list(attention.named_parameters()):
            if name != "gates":
                tensor = sort_heads(name, parameter, full, attention.config, attention.layer_idx)
                tensor.requires_grad_(parameter.requires_grad)
                module, _, kind = name.rpartition(".")
                setattr(attention.get_submodule(module), kind, tensor)
        name = host_adapter(attention.config).attention_name(attention.layer_idx)
        model.set_submodule(name, RoundedAttention(attention, attention.layer_idx, rounded).train(model.training))
    model.method = rounded
    model.config.method_config = rounded.to_dict()
