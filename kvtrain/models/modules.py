"""Modules that take the place of a host's norms, feed-forward layers, rotary and scaled word embedding.

They keep the host's parameter names and route the mathematics through ``kvtrain.kernels``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.mlp import swiglu
from kvtrain.kernels.norm import rms_norm
from kvtrain.kernels.rope import rotary_angles


class RMSNorm(nn.Module):
    """Takes the place of ``LlamaRMSNorm`` and its like; owns the same ``weight``."""

    host_epsilon = "variance_epsilon"  # the host's name for it

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        weight, epsilon = host.weight, getattr(host, self.host_epsilon)
        assert isinstance(weight, nn.Parameter) and isinstance(epsilon, float)
        self.weight, self.variance_epsilon = weight, epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``(..., D)``."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class ZeroCenteredRMSNorm(RMSNorm):
    """Takes the place of ``Gemma3RMSNorm`` and its like, which multiply by ``1 + weight``, in at least float32."""

    host_epsilon = "eps"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``(..., D)``."""
        return rms_norm(hidden_states, 1 + at_least_float32(self.weight), self.variance_epsilon)


class GatedMLP(nn.Module):
    """Takes the place of ``LlamaMLP`` and its like; owns the same three projections.

    Args:
        host: The module to replace.
        gate: From what ``gate_proj`` and ``up_proj`` make, ``(B, T, D)`` each, to what ``down_proj`` reads.
    """

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, host: nn.Module, gate: Callable[[Tensor, Tensor], Tensor] = swiglu) -> None:
        super().__init__()
        self.gate = gate
        for name, child in host.named_children():
            if name != "act_fn":
                self.add_module(name, child)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Feed ``(B, T, D)`` forward."""
        gated = self.gate(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        output: Tensor = self.down_proj(gated)
        return output


class ScaledEmbedding(nn.Embedding):
    """Takes the place of ``Gemma3TextScaledWordEmbedding`` and its like; owns the same ``weight``.

    The scale is a number here, where the host has a buffer that no file holds and that is float32 in any model.
    """

    def __init__(self, host: Any) -> None:
        super().__init__(host.num_embeddings, host.embedding_dim, host.padding_idx, _weight=host.weight)
        self.weight = host.weight  # not a copy: heads are tied to it
        self.scale = float(host.scalar_embed_scale)

    def forward(self, input: Tensor) -> Tensor:
        """Of ids ``(B, T)``, ``(B, T, D)``; the scale is rounded to the weight's dtype, as the host's."""
        embedded = super().forward(input)
        return embedded * embedded.new_full((), self.scale)


class RotaryEmbedding(nn.Module):
    """Takes the place of a host's rotary embedding of a static kind (default, linear, llama3, yarn).

    The attributes are the host's: transformers recomputes the frequencies of a model that it has loaded
    through the meta device by looking for ``original_inv_freq``, ``rope_type`` and ``config``.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.config, self.rope_type = host.config, host.rope_type
        self.compute_default_rope_parameters = host.compute_default_rope_parameters
        self.attention_scaling = float(host.attention_scaling)
        self.register_buffer("inv_freq", host.inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", host.original_inv_freq, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the frequencies anew, after the module has left the meta device by other means."""
        scaled = self.rope_type != "default"
        compute = ROPE_INIT_FUNCTIONS[self.rope_type] if scaled else self.compute_default_rope_parameters
        self.inv_freq.copy_(compute(self.config)[0])
        self.original_inv_freq.copy_(self.inv_freq)

    def _exact_frequencies(self) -> Tensor:
        """``(head_dim / 2,)`` in float64 of kind default or linear; the host's buffer is rounded to float32."""
        head_dim, parameters = 2 * self.inv_freq.numel(), self.config.rope_parameters
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=self.inv_freq.device) / head_dim
        frequencies = torch.pow(parameters["rope_theta"], -exponents)
        return frequencies / parameters["factor"] if self.rope_type == "linear" else frequencies

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, T, head_dim)`` in at least float32."""
        frequencies = self.inv_freq
        if hidden_states.dtype == torch.float64 and self.rope_type in ("default", "linear"):
            frequencies = self._exact_frequencies()
        cos, sin = rotary_angles(frequencies, position_ids, hidden_states.dtype)
        return cos * self.attention_scaling, sin * self.attention_scaling


class RotaryByLayerType(nn.ModuleDict):
    """Takes the place of a rotary embedding that has frequencies for each type of layer: one of each, by type."""

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``RotaryEmbedding``, of a type; None where all types are known to have the same frequencies."""
        rotary = next(iter(self.values())) if layer_type is None else self[layer_type]
        angles: tuple[Tensor, Tensor] = rotary(hidden_states, position_ids)
        return angles
