"""Modules that take the place of a host's norms, feed-forward layers and rotary embedding.

They keep the host's parameter names and route the mathematics through ``kvtrain.kernels``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvtrain.kernels.mlp import swiglu
from kvtrain.kernels.norm import rms_norm
from kvtrain.kernels.rope import rotary_angles


class RMSNorm(nn.Module):
    """Takes the place of ``LlamaRMSNorm`` and its like; owns the same ``weight``."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        weight, epsilon = host.weight, host.variance_epsilon
        assert isinstance(weight, nn.Parameter) and isinstance(epsilon, float)
        self.weight, self.variance_epsilon = weight, epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize ``(..., D)``."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """Takes the place of ``LlamaMLP`` and its like; owns the same three projections."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        for name, child in host.named_children():
            if name != "act_fn":
                self.add_module(name, child)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Feed ``(B, T, D)`` forward."""
        gated = swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        output: Tensor = self.down_proj(gated)
        return output


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
        """``(head_dim / 2,)`` in float64; the host's buffer is rounded to float32."""
        head_dim = 2 * self.inv_freq.numel()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=self.inv_freq.device) / head_dim
        return torch.pow(self.config.rope_parameters["rope_theta"], -exponents)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, T, head_dim)`` in at least float32."""
        frequencies = self.inv_freq
        if hidden_states.dtype == torch.float64 and self.rope_type == "default":
            frequencies = self._exact_frequencies()
        cos, sin = rotary_angles(frequencies, position_ids, hidden_states.dtype)
        return cos * self.attention_scaling, sin * self.attention_scaling
