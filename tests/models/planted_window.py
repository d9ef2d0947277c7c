"""A whole architecture in one file: attention sinks and a sliding window, for the test that plants it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtrain.cache.base import KVCacheLayer
from kvtrain.cache.ring import RingStore
from kvtrain.kernels.attention import attention
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models import build
from kvtrain.models.attention import HostAttention
from kvtrain.models.method import Method, key_value_shape
from kvtrain.models.registry import MethodArchitecture


class WindowCacheLayer(KVCacheLayer):
    def __init__(self, shape, window, placement):
        self.ring = RingStore(*shape, recent=window.recent, sink=window.sink, placement=placement)
        super().__init__(self.ring)

    def kv_tokens(self):
        kept = self.ring["tokens"].clamp(max=self.ring.sink + self.ring.recent)
        return kept[:, None].expand(-1, self.ring["keys"].shape[1])


class WindowAttention(HostAttention):
    def __init__(self, host_attention, layer_idx, window):
        super().__init__(host_attention, layer_idx)
        self.window = window

    def forward(self, hidden_states, position_embeddings, context, **_):
        query, key, value = (
            self.split_heads(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (apply_rotary(heads, *position_embeddings) for heads in (query, key))
        if context.cache is None:
            documents = context.documents
            output, _lse = attention(
                query,
                key,
                value,
                window=self.window.recent,
                sink=self.window.sink,
                documents=Documents.of(documents),
                scale=self.scaling,
            )
        else:
            ring = context.cache_layer(self.layer_idx).ring
            output = self._serve(query, key, value, context.positions, context.valid, ring)
            ring.write(key, value, context.valid)
        return self.project_out(output), None

    def _serve(self, query, key, value, positions, valid, ring):
        """Dense and plain: the ring beside the new tokens, and who may see whom by position."""
        positions = positions.expand(valid.shape)
        keys, values, held = ring.gather()
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        places = torch.cat([held, positions.masked_fill(~valid, -1)], 1)[:, None, :]
        age = positions[:, :, None] - places
        seen = (places >= 0) & (age >= 0) & ((age < self.window.recent) | (places < self.window.sink))
        groups = query.shape[1] // keys.shape[1]
        scores = query @ keys.repeat_interleave(groups, 1).mT * self.scaling
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num()
        return weights @ values.repeat_interleave(groups, 1)


@dataclass(frozen=True)
class Window(Method):
    name: ClassVar[str] = "window"
    sink: int = 2
    recent: int = 6


class Builder(build.Builder):
    def attention(self, host_attention, layer_idx):
        return WindowAttention(host_attention, layer_idx, self.settings)

    def cache_layer(self, layer_idx, placement):
        return WindowCacheLayer(key_value_shape(self.host_config), self.settings, placement)

    def deploy(self, model):
        model.model.norm.weight.data.mul_(2.0)


ARCHITECTURE = MethodArchitecture(Window, __name__)
