"""What a TransNormer layer is made of besides attention: norms, the feed-forward part, relative positions."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.mlp import swiglu
from kvtrain.kernels.norm import simple_rms_norm
from kvtrain.models.transnormer.config import TransNormerConfig

ROPE_BASE = 10000.0


class SimpleRMSNorm(nn.Module):
    """Divides by the root mean square over all channels; has no weights."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        self.epsilon, self.in_root = config.norm_eps, config.norm_eps_in_root

    def forward(self, hidden_states: Tensor, real: Tensor | None = None) -> Tensor:
        """Normalize ``(B, T, D)``; every token by itself, so ``real (B, T)`` makes no difference."""
        return simple_rms_norm(hidden_states, self.epsilon, epsilon_in_root=self.in_root)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over the real tokens of all ranks' batches; padding does not count."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config.hidden_size)

    def forward(self, hidden_states: Tensor, real: Tensor | None = None) -> Tensor:
        """Normalize ``(B, T, D)``; ``real (B, T)`` says which tokens count."""
        if not self.training:
            return super().forward(hidden_states.flatten(0, 1)).view_as(hidden_states)
        wide = at_least_float32(hidden_states)
        weight = torch.ones_like(wide[..., :1]) if real is None else real[..., None].to(wide.dtype)
        count = _over_ranks(weight.sum()).clamp(min=1)
        mean = _over_ranks((weight * wide).sum((0, 1))) / count
        variance = _over_ranks((weight * (wide - mean).square()).sum((0, 1))) / count
        self._remember(mean, variance * count / (count - 1).clamp(min=1))
        scale = self.weight.to(wide.dtype) * (variance + self.eps).rsqrt()
        return ((wide - mean) * scale + self.bias.to(wide.dtype)).to(hidden_states.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, which are what counts outside of training."""
        if torch._C._current_graph_task_id() != -1:  # a backward pass that runs the layer again has seen this batch
            return
        assert self.momentum is not None and self.num_batches_tracked is not None
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(value.to(running.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


def _over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, with gradients."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    summed: Tensor = _SumOverRanks.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


class _SumOverRanks(torch.autograd.Function):
    """Every rank's output depends on every rank's input, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The sum; the input stays as it is."""
        summed = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum of what came back to the ranks."""
        return _over_ranks(gradient)


def make_norm(config: TransNormerConfig) -> nn.Module:
    """The kind of norm that a configuration asks for."""
    return TokenBatchNorm(config) if config.norm == "batch" else SimpleRMSNorm(config)


class Projection(nn.Linear):
    """A linear layer of attention, which knows how it begins: transformers shows initialization no module around it.

    Args:
        width: Channels in and out.
        gain: Of Xavier's initial weights.
        zero_bias: Begin with a bias of zeros.
    """

    def __init__(self, width: int, gain: float, zero_bias: bool = False) -> None:
        super().__init__(width, width)
        self.gain, self.zero_bias = gain, zero_bias


class TransNormerMLP(nn.Module):
    """A gated linear unit, or two plain layers; with biases."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.activation, self.gated = config.hidden_act, config.gated_mlp
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Feed ``(B, T, D)`` forward."""
        output: Tensor = self.down_proj(self._inner(hidden_states))
        return output

    def _inner(self, hidden_states: Tensor) -> Tensor:
        up = self.up_proj(hidden_states)
        if not self.gated:
            return self._activate(up)
        gate = self.gate_proj(hidden_states)
        return swiglu(gate, up) if self.activation == "silu" else self._activate(gate) * up

    def _activate(self, hidden_states: Tensor) -> Tensor:
        if self.activation == "identity":
            return hidden_states
        return functional.silu(hidden_states) if self.activation == "silu" else functional.gelu(hidden_states)


class RelativePosition(nn.Module):
    """Turns queries and keys so that their products tell how far apart they are.

    LRPE (Qin et al. 2023, as the released code has it): ``Rot(p theta) (I - 2 v v^T) x`` with learnt angles ``theta``
    and a random unit vector ``v``, both shared by the heads. RoPE: fixed angles, no reflection.

    Args:
        head_dim: Channels of a head, D.
        learned: LRPE, or RoPE.

    Attributes:
        theta: ``(D / 2,)``, radians a token.
        reflection: ``(D,)``, v.
    """

    theta: Tensor
    reflection: Tensor | None

    def __init__(self, head_dim: int, learned: bool) -> None:
        super().__init__()
        self.head_dim, self.learned = head_dim, learned
        # Buffers are part of the state in either case: a folder says by itself what was trained.
        if learned:
            self.theta = nn.Parameter(torch.empty(head_dim // 2))
            self.register_buffer("reflection", torch.empty(head_dim))
        else:
            self.register_buffer("theta", torch.empty(head_dim // 2))
            self.reflection = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """RoPE's angles, and a random direction."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=self.theta.device) / self.head_dim
        self.theta.copy_(torch.pow(ROPE_BASE, -exponents))
        if self.reflection is not None:
            self.reflection.copy_(functional.normalize(torch.randn_like(self.reflection), dim=0))

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The angles of positions ``(B, T)``, and the mirror in ``dtype``."""
        return *self.angles(position_ids, dtype), self.mirror(dtype).to(dtype)

    def mirror(self, dtype: torch.dtype) -> Tensor:
        """The reflection as a matrix ``(D, D)`` for rows; its columns give all even channels first, then the odd ones.

        Products of queries and keys do not depend on the order of channels, and halves are turned faster than pairs.
        """
        eye = torch.eye(self.head_dim, dtype=torch.promote_types(dtype, torch.float32), device=self.theta.device)
        if self.reflection is not None:
            v = self.reflection.to(eye.dtype)
            eye = eye - 2 * torch.outer(v, v)
        return torch.cat([eye[:, 0::2], eye[:, 1::2]], 1)

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, T, D)`` of positions ``(B, T)``, in at least float32.

        Angles grow with the position: they are multiplied and brought back to one turn in float64, or a hundred
        thousand tokens on the fourth digit would be gone.
        """
        turns = (position_ids.double()[..., None] * self.theta.double()).remainder(2 * math.pi)
        turns = turns.to(torch.promote_types(dtype, torch.float32))
        turns = torch.cat([turns, turns], -1)
        return turns.cos(), turns.sin()
