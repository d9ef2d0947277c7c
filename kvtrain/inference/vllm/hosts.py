"""Classes of vLLM's own for families of hosts, with a method's cache in them; made when somebody asks for a name."""

import functools
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, IsHybrid

from kvtrain.inference.vllm.attention import place_layers
from kvtrain.inference.vllm.ring_pages import ring_layout, ring_store
from kvtrain.inference.vllm.roles import Role, class_name, host_and_role
from kvtrain.inference.vllm.state_layout import StateLayout
from kvtrain.models.hosts import retrofitted_name
from kvtrain.models.paged_layers import paged_layers


class WithMethod:
    """Before vLLM's class of a host among the bases of a class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model: Any = self
        place_layers(model.model.layers, vllm_config.model_config.hf_config, vllm_config)

    @functools.cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        """Of vLLM's transformers backend: what it builds is the host."""
        own: Any = self
        return {"config": own.text_config, "dtype": own.model_config.dtype, "trust_remote_code": False}


class WithState(HasInnerState):
    """Of models that keep a state of constant size besides or instead of blocks."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """See vLLM's ``IsHybrid``: a page of the ring."""
        return ((_layout(vllm_config).piece_bytes,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """See vLLM's ``IsHybrid``."""
        return (torch.uint8,)


def _layout(vllm_config: VllmConfig) -> StateLayout:
    model, block_size = vllm_config.model_config, vllm_config.cache_config.block_size
    layer = paged_layers(model.hf_config)[0]
    assert layer.ring is not None
    return ring_layout(ring_store(layer.ring, model.dtype), layer, block_size)


_BASES: dict[Role, tuple[type, ...]] = {
    Role.PAGED: (),
    Role.HYBRID: (WithState, IsHybrid),
    Role.STATE: (WithState, IsAttentionFree),
}


@functools.cache
def served_class(host: str, role: Role) -> type[nn.Module]:
    """The class of vLLM of a host with a method's cache.

    Args:
        host: Its name, such as ``LlamaForCausalLM``.
        role: What the cache is made of.
    """
    base = ModelRegistry.models[host].load_model_cls()
    name = class_name(retrofitted_name(host), role)
    return type(name, (WithMethod, base, *_BASES[role]), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    found = host_and_role(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served_class(*found)
