"""What stands where vLLM's attention of a layer stood: blocks of another layer, a window, a ring for some heads."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

from kvtrain.inference.vllm.ring_pages import ring_layout, ring_store
from kvtrain.inference.vllm.state_pages import Requests, StatePages
from kvtrain.models.hosts import host_adapter
from kvtrain.models.paged_layers import PagedLayer, paged_layers
from kvtrain.models.windows import attend_ring


def place_layers(layers: Iterable[nn.Module], config: PreTrainedConfig, vllm_config: VllmConfig) -> None:
    """Let the attention of every layer read and fill the cache that its method asks for.

    vLLM's classes of all families, and those of its transformers backend, have one ``attn`` in a layer's attention,
    which is given rotated queries and keys; that is what is replaced, and nothing around it needs to know.

    Args:
        layers: Of vLLM's model.
        config: Of the retrofitted host.
        vllm_config: vLLM's.
    """
    known = vllm_config.compilation_config.static_forward_context
    modules = [getattr(layer, host_adapter(config.host_config).attention) for layer in layers]
    names = [module.attn.layer_name for module in modules]
    for module, layer, name in zip(modules, paged_layers(config), names, strict=True):
        del known[name]
        source = names[layer.source]
        module.attn = _attention(module.attn, layer, name, None if source == name else source, vllm_config)
        if source != name:
            _drop_keys(module)


def _attention(host: Attention, layer: PagedLayer, name: str, source: str | None, vllm_config: VllmConfig) -> nn.Module:
    paged: nn.Module | None = None
    host_config = vllm_config.model_config.hf_config
    groups = host_config.num_attention_heads // host_config.num_key_value_heads
    if layer.num_paged_heads:
        heads = min(layer.num_paged_heads, host.num_kv_heads)  # of which a rank of tensor parallelism has some
        paged = Attention(
            heads * groups,
            host.head_size,
            host.impl.scale,
            num_kv_heads=heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=layer.window,
            prefix=name,
            kv_sharing_target_layer_name=source,
        )
    if layer.ring is None:
        assert paged is not None
        return paged
    return RingAttention(paged, layer, groups, host.impl.scale, name, vllm_config)


class RingAttention(nn.Module):
    """The first heads by vLLM's attention, the others over a ring of their first and latest tokens.

    Args:
        paged: Of the first heads, where there are any.
        layer: With a ring.
        groups: Query heads of a key-value head.
        scale: Factor on the scores.
        name: Of the layer's attention.
        vllm_config: vLLM's.
    """

    def __init__(
        self, paged: nn.Module | None, layer: PagedLayer, groups: int, scale: float, name: str, vllm_config: VllmConfig
    ) -> None:
        super().__init__()
        assert layer.ring is not None
        self.paged, self.scale, self.head_dim = paged, scale, layer.ring.head_dim
        self.counts = [heads * layer.ring.head_dim for heads in (layer.num_paged_heads * groups, layer.num_paged_heads)]
        self.ring = ring_store(layer.ring, vllm_config.model_config.dtype)
        self.state = StatePages(ring_layout(self.ring, layer, vllm_config.cache_config.block_size), f"{name}.ring")

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend.

        Args:
            query: ``(T, H * D)`` of the step's tokens.
            key: ``(T, H_kv * D)``.
            value: ``(T, H_kv * D)``.
        """
        queries, keys = self.counts
        parts = []
        if self.paged is not None:
            own = query[:, :queries], key[:, :keys], value[:, :keys]
            parts.append(self.paged(*(part.contiguous() for part in own)))
        parts.append(self._stream(query[:, queries:], key[:, keys:], value[:, keys:]))
        return torch.cat(parts, 1)

    def _stream(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads of the ring, ``(T, h * D)``."""
        states = [states.unflatten(1, (-1, self.head_dim)) for states in (query, key, value)]  # (T, h, D)

        def attend(requests: Requests) -> Tensor:
            rows = (part[requests.tokens].transpose(1, 2) for part in states)  # (B, h, n, D)
            return attend_ring(self.ring, *rows, scale=self.scale).transpose(1, 2).flatten(2)

        output = torch.zeros_like(query)
        self.state.run(attend, output)
        return output


class QueryProjection(ColumnParallelLinear):
    """Projects queries alone where the host projects keys and values too, which nobody reads: these are zeros.

    Args:
        host: The projection of all three.
    """

    def __init__(self, host: QKVParallelLinear) -> None:
        size = host.total_num_heads * host.head_size
        own = {"quant_config": host.quant_config, "prefix": host.prefix, "return_bias": host.return_bias}
        super().__init__(host.hidden_size, size, host.bias is not None, **own)
        self.output_sizes = host.output_sizes  # by which what comes out is split
        self.absent = 2 * host.num_kv_heads * host.head_size

    def forward(self, hidden: Tensor) -> Any:
        """Queries, and zeros in the place of keys and values, ``(T, (H + 2 H_kv) D)``; as the host, with a bias."""
        projected = super().forward(hidden)
        if not self.return_bias:
            return pad(projected, (0, self.absent))
        query, bias = projected
        return pad(query, (0, self.absent)), bias

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, shard: str = "q") -> None:
        """Load the shard of queries, the only one that a folder has for a layer that reads another's keys."""
        assert shard == "q"
        super().weight_loader(param, loaded_weight)

    def weight_loader_v2(self, param: nn.Parameter, loaded_weight: Tensor, shard: str = "q") -> None:
        """As ``weight_loader``."""
        assert shard == "q"
        super().weight_loader_v2(param, loaded_weight)


def _drop_keys(module: nn.Module) -> None:
    """Take out what would make keys and values of a layer that reads another's."""
    if isinstance(getattr(module, "qkv_proj", None), QKVParallelLinear):
        module.qkv_proj = QueryProjection(module.qkv_proj)
    if hasattr(module, "k_norm"):
        module.k_norm = nn.Identity()
