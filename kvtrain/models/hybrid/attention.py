"""A linear layer of a hybrid: the host's projections, NormAttention's norm in place of a denominator, decay, a gate.

    out_t = norm(sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s) * sigmoid(gate x_t)

Queries and keys are rotated as in the host, so that their product knows the distance. One function trains and serves:
chunks over a whole row, chunks over a prompt behind a state, and one token behind a state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.linear_attention import linear_attention
from kvtrain.kernels.linear_attention_chunked import document_layout
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.hybrid.config import Hybrid
from kvtrain.models.linear_state import LinearStateLayer, attend_state
from kvtrain.models.modules import RMSNorm

NORM_EPS = 1e-6


@dataclass(frozen=True)
class HybridStep:
    """What a training step tells every linear layer.

    Args:
        targets: By linear layer what the host's attention gives for the same input, ``(B, T, hidden)``, where layers
            learn to match it. Each then passes on its target, so that the layers above see what they see in the host.
    """

    targets: Mapping[int, Tensor]


class LinearMixer(HostAttention):
    """Takes the place of softmax attention; its state does not grow.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        settings: The method.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, settings: Hybrid) -> None:
        super().__init__(host_attention, layer_idx)
        self.settings, self._slopes = settings, settings.slopes(self.num_heads)
        self.mixer_norm = RMSNorm(LlamaRMSNorm(self.head_dim, NORM_EPS))
        if settings.gate:
            self.mixer_gate = nn.Linear(int(self.config.hidden_size), self.num_heads * self.head_dim, bias=False)
            nn.init.zeros_(self.mixer_gate.weight)

    def mixing_flops(self, sequence_length: int) -> int:
        """See ``HostAttention``; a key and value into the state, a query through it."""
        return 2 * 2 * self.num_heads * self.head_dim**2

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``.

        ``context.step`` may be a ``HybridStep``: what comes out is then the layer's target, and ``context.outputs``
        receives how far the layer is from it, ``(2,)`` with a gradient for this layer alone: the sums over real tokens
        of the squared difference and of the squared target.
        """
        step: HybridStep | None = context.step
        if step is None:
            return self._mix(hidden_states, position_embeddings, context), None
        target = step.targets[self.layer_idx]
        assert context.outputs is not None
        mixed = self._mix(hidden_states.detach(), position_embeddings, context)
        context.outputs[self.layer_idx] = squared_distance(mixed, target, context.real)
        return target, None

    def _mix(self, hidden_states: Tensor, angles: Angles, context: ForwardContext) -> Tensor:
        query, key, value, gate = self._project(hidden_states, angles, context)
        slopes, documents = self._own_slopes(query, context), _documents(context)
        if context.cache is None:
            output, _ = linear_attention(query, key, value, slopes=slopes, **documents)
        else:
            layer = context.cache_layer(self.layer_idx)
            assert isinstance(layer, LinearStateLayer) and context.valid is not None
            known = None if context.single else context.valid
            output = attend_state(query, key, value, layer, slopes=slopes, valid=known, documents=documents)
        output = self.mixer_norm(output)
        if gate is not None:
            output = output * torch.sigmoid(at_least_float32(gate))
        return self.project_out(output.to(hidden_states.dtype), context.parallel)

    def _project(
        self, hidden_states: Tensor, angles: Angles, context: ForwardContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and the gate before its sigmoid, ``(B, H, T, D)`` each, of own heads."""
        query, key = self.normalize(
            self.split_heads(self.q_proj(hidden_states)), self.split_heads(self.k_proj(hidden_states))
        )
        if self.settings.features == "elu":
            query, key = 1 + elu(query), 1 + elu(key)
        heads = [query, key, self.split_heads(self.v_proj(hidden_states))]
        if self.settings.gate:
            heads.append(self.split_heads(self.mixer_gate(hidden_states)))
        query, key, value, *gate = context.parallel.to_heads(*heads)
        query, key = (apply_rotary(part, *angles, halves_repeat=True) for part in (query, key))
        key, value = (part.repeat_interleave(self.num_groups, 1) for part in (key, value))
        if value.dtype == torch.float16:  # which ends at 65,504: sums over a few thousand tokens do not
            value = value.float()
        return query * self.scaling, key, value, gate[0] if gate else None

    def _own_slopes(self, query: Tensor, context: ForwardContext) -> Tensor | None:
        """Of the heads that this rank attends."""
        if self._slopes is None:
            return None
        wide = torch.promote_types(query.dtype, torch.float32)
        return torch.tensor(self._slopes, dtype=wide, device=query.device)[context.parallel.own_heads(self.num_heads)]


def squared_distance(mixed: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """Sums ``(2,)`` over real tokens, in at least float32: of the squared difference, and of the squared target.

    Args:
        mixed: ``(B, T, hidden)``.
        target: ``(B, T, hidden)``.
        real: ``(B, T)``; None: all tokens are.
    """
    target = at_least_float32(target)
    squares = torch.stack([(at_least_float32(mixed) - target).square().sum(-1), target.square().sum(-1)])
    return (squares if real is None else torch.where(real, squares, 0.0)).sum((1, 2))


def _documents(context: ForwardContext) -> dict[str, Any]:
    """What linear attention must know of documents and padding, found once a pass; nothing where there is none."""
    return context.keep("linear documents", lambda: _find_documents(context))


def _find_documents(context: ForwardContext) -> dict[str, Any]:
    if context.documents is not None:
        ids = context.documents.queries
    elif context.single or context.valid is None or bool(context.valid.all()):
        return {}
    else:
        ids = context.valid.long()
    return {"document_ids": ids, "layout": document_layout(ids)}
