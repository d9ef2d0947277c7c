"""Grouped-query attention by conversion (Ainslie et al. 2023, section 2.1): fewer key-value heads, a plain host."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.hosts import common_key_value_shape, host_adapter

Pooling = Literal["mean", "first"]


def convert_gqa(host: PreTrainedModel, num_key_value_heads: int, how: Pooling = "mean") -> PreTrainedModel:
    """Let more query heads share a key-value head; the result wants some more training.

    Each new key and value projection is the mean of those that it replaces (the paper's choice), or the first of them.

    Args:
        host: A causal language model with separate projections; it stays as it was.
        num_key_value_heads: Of the result; divides the host's.
        how: ``"mean"`` or ``"first"``.

    Returns:
        A new model of the host's class.

    Raises:
        ValueError: The number does not divide the host's, the way is unknown, the model is retrofitted already, or its
            family has no adapter.
    """
    if isinstance(host.config, KVTrainConfig):
        raise ValueError("this model is retrofitted already; convert its host, then retrofit the result")
    if how not in ("mean", "first"):
        raise ValueError(f"how must be 'mean' or 'first', not {how!r}")
    config = gqa_config(host.config, num_key_value_heads)
    converted: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    nn.Module.to(converted, device=host.device, dtype=host.dtype)
    converted.load_state_dict(gqa_state(host.state_dict(), host.config, num_key_value_heads, how))
    converted.generation_config = host.generation_config
    nn.Module.train(converted, host.training)
    return converted


def share_unchanged(converted: PreTrainedModel, host: PreTrainedModel) -> None:
    """Give a converted model the very parameters of its host where the conversion left them alone.

    Args:
        converted: From ``convert_gqa``; what the two share is then one, whoever trains or moves it.
        host: Its host.
    """
    pooled, theirs = _per_key_value_head(host.config), dict(host.named_parameters())
    for name in [name for name, _ in converted.named_parameters() if not name.startswith(pooled)]:
        parent, _, last = name.rpartition(".")
        setattr(converted.get_submodule(parent), last, theirs[name])
    converted.tie_weights()


def gqa_state(
    state: Mapping[str, Tensor], config: PreTrainedConfig, num_key_value_heads: int, how: Pooling = "mean"
) -> dict[str, Tensor]:
    """A host's weights by name with so many key-value heads; those that change are in at least float32.

    Args:
        state: The host's.
        config: Its configuration, as it was.
        num_key_value_heads: Of the result.
        how: ``"mean"`` or ``"first"``.
    """
    prefixes = _per_key_value_head(config)
    old, _ = common_key_value_shape(config)
    return {
        name: _pool(tensor, old, num_key_value_heads, how) if name.startswith(prefixes) else tensor
        for name, tensor in state.items()
    }


def gqa_config(config: PreTrainedConfig, num_key_value_heads: int) -> PreTrainedConfig:
    """The host's configuration with so many key-value heads.

    Raises:
        ValueError: They do not divide the host's, or its layers differ.
    """
    old, _ = common_key_value_shape(config)
    if num_key_value_heads < 1 or old % num_key_value_heads:
        divisors = ", ".join(str(n) for n in range(1, old) if old % n == 0)
        raise ValueError(f"{old} key-value heads cannot become {num_key_value_heads}; use {divisors}")
    settings: dict[str, Any] = {**config.to_dict(), "num_key_value_heads": num_key_value_heads}
    return type(config).from_dict(settings)


def _per_key_value_head(config: PreTrainedConfig) -> tuple[str, ...]:
    """How names of weights begin that have a part for every key-value head: projections, and a norm over all heads."""
    adapter = host_adapter(config)
    modules = ["k_proj", "v_proj", *(["k_norm"] if adapter.query_key_norm == "all" else [])]
    layers = range(config.num_hidden_layers)
    return tuple(f"{adapter.attention_name(layer)}.{module}." for layer in layers for module in modules)


def _pool(parameter: Tensor, old: int, new: int, how: Pooling) -> Tensor:
    """``(old * D, ...)`` to ``(new * D, ...)``."""
    groups = parameter.unflatten(0, (new, old // new, -1))
    pooled = at_least_float32(groups).mean(1) if how == "mean" else groups[:, 0]
    return pooled.flatten(0, 1)
