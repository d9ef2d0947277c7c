"""Surgery on gated models: gates put in, rounded, and the heads of every layer sorted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvtrain.models.attention import HostAttention
from kvtrain.models.duo.attention import GatedAttention, RoundedAttention
from kvtrain.models.duo.config import Duo
from kvtrain.models.duo.gates import HARD_CONCRETE_START, choose_full_heads
from kvtrain.models.method import key_value_shape


def adapt_state(settings: Duo, state: dict[str, Tensor], host_config: PreTrainedConfig) -> dict[str, Tensor]:
    """A host's weights by name with open gates, or with the heads that ``full_heads`` names sorted to the front."""
    heads = key_value_shape(host_config)[0]
    if settings.full_heads is None:
        start = HARD_CONCRETE_START if settings.gates == "hard_concrete" else 1.0
        names = [f"model.layers.{layer}.self_attn.gates" for layer in range(host_config.num_hidden_layers)]
        return {**state, **{name: torch.full((heads,), start) for name in names}}
    return {name: _sorted_for(settings, name, tensor, host_config) for name, tensor in state.items()}


def _sorted_for(settings: Duo, name: str, tensor: Tensor, host_config: PreTrainedConfig) -> Tensor:
    """One of a host's weights, its heads sorted; what has none stays the host's own."""
    assert settings.full_heads is not None
    parts = name.split(".")
    if "self_attn" not in parts:
        return tensor
    heads, head_dim = key_value_shape(host_config)
    order = head_order(settings.full_heads[int(parts[2])], heads)
    groups = host_config.num_attention_heads // heads
    return sort_heads(parts[4], parts[5], tensor, order, groups, head_dim)


def head_order(full: Sequence[int], num_key_value_heads: int) -> list[int]:
    """Full heads, then streaming ones, each in their old order."""
    return [*full, *(head for head in range(num_key_value_heads) if head not in full)]


def sort_heads(module: str, kind: str, tensor: Tensor, order: list[int], groups: int, head_dim: int) -> Tensor:
    """A weight or bias of an attention with its heads in another order.

    Args:
        module: ``q_proj``, ``k_norm`` ...
        kind: ``weight`` or ``bias``.
        tensor: The parameter.
        order: Old number of every new key-value head.
        groups: Query heads to a key-value head.
        head_dim: Channels of a head.
    """
    grouped = groups if module in ("q_proj", "o_proj", "q_norm") else 1
    rows = (torch.tensor(order)[:, None] * grouped * head_dim + torch.arange(grouped * head_dim)).flatten()
    if module == "o_proj":  # whose outputs, and so its bias, are no heads
        return nn.Parameter(tensor[:, rows].detach()) if kind == "weight" else tensor
    if module in ("q_norm", "k_norm") and tensor.numel() == head_dim:  # one norm for every head
        return tensor
    return nn.Parameter(tensor[rows].detach())


def gates_of(model: PreTrainedModel) -> Tensor:
    """Gates ``(layers, H_kv)`` as they would be used in evaluation, without gradient.

    Raises:
        ValueError: The model has none.
    """
    gated = [module for module in model.modules() if isinstance(module, GatedAttention)]
    if not gated:
        raise ValueError("this model has no gates; retrofit one with kvtrain.Duo()")
    return torch.stack([module.gate_values().detach().float().cpu() for module in gated])


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
    rounded = settings.rounded(choose_full_heads(gates, sparsity))
    assert rounded.full_heads is not None
    for layer, full in zip(model.model.layers, rounded.full_heads, strict=True):
        attention: HostAttention = layer.self_attn
        order = head_order(full, attention.num_key_value_heads)
        for module, child in attention.named_children():
            for kind, parameter in list(child.named_parameters()):
                tensor = sort_heads(module, kind, parameter, order, attention.num_groups, attention.head_dim)
                tensor.requires_grad_(parameter.requires_grad)
                setattr(child, kind, tensor)
        layer.self_attn = RoundedAttention(attention, attention.layer_idx, rounded).train(model.training)
    model.method = rounded
    model.config.method_config = rounded.to_dict()
