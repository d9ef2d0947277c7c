"""Attention that may read another layer's keys and values, in training and in serving."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvtrain.kernels.attention import attention
from kvtrain.kernels.context_parallel import WHOLE_ROWS, ContextParallel
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.lckv.config import LCKV

# Of the new tokens, keys rotated: (B, H_kv, T, D) each; None of what a layer does not own.
KeyValue = tuple[Tensor | None, Tensor | None]

# Factor on the weights of a residual mix, which so learn at this multiple of the learning rate (YOCO++ code: 35).
RESIDUAL_SCALE = 35.0


class View(Protocol):
    """How a layer reads and writes a cache while new tokens go in; ``cache_view.CacheView`` is it."""

    def attend(
        self, module: "SharedAttention", query: Tensor, key: Tensor | None, value: Tensor | None, key_value: KeyValue
    ) -> Tensor:
        """Store what a layer has made, and attend, ``(B, H, n, D)``."""


@dataclass(frozen=True)
class LayerInputs:
    """What one call of one layer reads.

    Everything that it reads comes in here, and nothing is remembered: a layer that runs many times, or again under
    activation checkpointing, sees what it saw the first time.

    Attributes:
        key: ``(B, H_kv, T, D)`` of the layer that it reads, where that is another one or ``own`` is False; None where
            nothing is there yet.
        value: Likewise.
        own: Whether an owner sees the keys and values that it makes in this call.
        first: Keys and values of layer 0, for a residual mix.
        documents: Documents, or real tokens, of the input.
        parallel: Ranks that share the rows: keys and values are of whole rows and own heads.
        key_value_only: Stop once keys and values are made.
        reader: Of the cache, while serving.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    own: bool = True
    first: KeyValue | None = None
    documents: Documents | None = None
    parallel: ContextParallel = WHOLE_ROWS
    key_value_only: bool = False
    view: View | None = None


@dataclass
class LayerOutputs:
    """What one call of one layer makes. No ``dict``: offloading and sharding hand modules copies of those.

    Attributes:
        key_value: Keys and values that the layer owns.
    """

    key_value: KeyValue = (None, None)


class SharedAttention(HostAttention):
    """A host's attention without the projections that nobody needs.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        settings: The method.
    """

    key_mix: nn.Parameter  # of owners with a residual
    value_mix: nn.Parameter

    def __init__(self, host_attention: nn.Module, layer_idx: int, settings: LCKV) -> None:
        super().__init__(host_attention, layer_idx)
        config: Any = host_attention.config
        keys, values = settings.maps(config.num_hidden_layers)
        self.key_layer, self.value_layer = keys.sources[layer_idx], values.sources[layer_idx]
        self.owns_key, self.owns_value = layer_idx in keys.owners, layer_idx in values.owners
        self.cyclic = keys.is_cyclic(layer_idx)
        self.strict = self.cyclic or settings.mask_all_diagonals  # no token sees its own key
        self.window = settings.sliding_window if keys.sliding[layer_idx] else None
        for name in absent_parts(layer_idx, settings, config.num_hidden_layers):
            if hasattr(self, name):
                delattr(self, name)
        for name in residual_parts(layer_idx, settings, config.num_hidden_layers):
            self.register_parameter(name, nn.Parameter(no_residual().to(self.q_proj.weight)))

    def key_value(self, hidden: Tensor, angles: Angles, first: KeyValue | None, parallel: ContextParallel) -> KeyValue:
        """Keys and values that this layer owns, of ``hidden (B, T, hidden)``; keys are rotated."""
        key = value = None
        if self.owns_key:
            (key,) = parallel.to_heads(self.norm_heads("k_norm", self.split_heads(self.k_proj(hidden))))
            key = apply_rotary(key, *angles, halves_repeat=True)
        if self.owns_value:
            (value,) = parallel.to_heads(self.split_heads(self.v_proj(hidden)))
        if first is not None and hasattr(self, "key_mix"):
            key = _mix(self.key_mix, first[0], key)
        if first is not None and hasattr(self, "value_mix"):
            value = _mix(self.value_mix, first[1], value)
        return key, value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Angles,
        inputs: LayerInputs | None = None,
        outputs: LayerOutputs | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend to what the inputs say.

        Args:
            hidden_states: ``(B, T, hidden)``.
            position_embeddings: Cosines and sines ``(B, T, D)``.
            inputs: What to read.
            outputs: Receives what the layer makes; where that is all that is wanted, the output is the input.
        """
        assert inputs is not None and outputs is not None
        parallel = inputs.parallel
        own_key, own_value = self.key_value(hidden_states, position_embeddings, inputs.first, parallel)
        outputs.key_value = own_key, own_value
        if inputs.key_value_only:
            return hidden_states, None
        key = own_key if inputs.own and self.key_layer == self.layer_idx else inputs.key
        value = own_value if inputs.own and self.value_layer == self.layer_idx else inputs.value
        if inputs.view is None and (key is None or value is None):
            return self._nothing(hidden_states), None
        (query,) = parallel.to_heads(self.norm_heads("q_norm", self.split_heads(self.q_proj(hidden_states))))
        query = apply_rotary(query, *position_embeddings, halves_repeat=True)
        if inputs.view is not None:
            output = inputs.view.attend(self, query, key, value, outputs.key_value)
        else:
            assert key is not None and value is not None
            output, _lse = attention(
                query,
                key,
                value,
                strict=self.strict,
                window=self.window,
                documents=inputs.documents,
                scale=self.scaling,
            )
        return self.project_out(output, parallel), None

    def _nothing(self, hidden: Tensor) -> Tensor:
        """Output ``(B, T, hidden)`` of attention to no keys: zeros, projected."""
        nothing = hidden.new_zeros(*hidden.shape[:2], self.num_heads * self.head_dim)
        output: Tensor = torch.zeros_like(hidden) if self.o_proj.bias is None else self.o_proj(nothing)
        return output


def absent_parts(layer_idx: int, settings: LCKV, depth: int) -> list[str]:
    """Names of the host attention's parts that a layer has no use for."""
    keys, values = settings.maps(depth)
    absent = [] if layer_idx in keys.owners else ["k_proj", "k_norm"]
    return absent if layer_idx in values.owners else [*absent, "v_proj"]


def residual_parts(layer_idx: int, settings: LCKV, depth: int) -> list[str]:
    """Names of the weights ``(2,)`` by which a layer mixes the first layer's states into its own."""
    keys, values = settings.maps(depth)
    if not settings.residual or layer_idx == 0:
        return []
    return ["key_mix"] * (layer_idx in keys.owners) + ["value_mix"] * (layer_idx in values.owners)


def no_residual() -> Tensor:
    """Weights ``(2,)`` of a mix that is the layer's own state."""
    return torch.tensor([0.0, 1 / RESIDUAL_SCALE], dtype=torch.float64)


def _mix(weights: Tensor, first: Tensor | None, own: Tensor | None) -> Tensor:
    """Section 3 of YOCO++: a share of the first layer's states and one of the layer's own."""
    assert first is not None and own is not None
    share: Tensor = weights.to(own.dtype) * RESIDUAL_SCALE
    return share[0] * first + share[1] * own
