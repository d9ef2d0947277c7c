"""DuoAttention's two forms: heads with gates, which train, and rounded heads, which a cache serves.

Everywhere a token sees the same: in a full head all tokens before it, in a streaming head the first ``sink`` of its
document and the latest ``recent``, itself included, at their true positions (no re-rotation). With ``compensation`` a
streaming head sees one token more, which stands for all others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.cache.rows import bookkeeping
from kvtrain.kernels.compensation import Dropped, add_compensation
from kvtrain.kernels.noise import keyed_logistic
from kvtrain.kernels.quantization import read_back
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.duo.config import Duo
from kvtrain.models.duo.gates import gate_values
from kvtrain.models.duo.patterns import AttentionPatterns, mix_heads
from kvtrain.models.streaming_cache import StreamingCacheLayer
from kvtrain.models.windows import attend_cache_and_window


@dataclass(frozen=True)
class DuoStep:
    """What a training step tells every gated attention.

    Args:
        full_attention: The pass of the teacher: gates count as 1.
        teacher: What heads saw there, ``(B, H, T, D)`` by layer, to be mixed in instead of the student's own full
            attention.
        seed: Of random gates.
        step: Optimizer step; None: gates are the most likely ones.
        gates: ``(H_kv,)`` by layer, in place of the model's own.
    """

    full_attention: bool = False
    teacher: Mapping[int, Tensor] | None = None
    seed: int = 0
    step: int | None = None
    gates: Mapping[int, Tensor] | None = None


class GatedAttention(HostAttention):
    """Every key-value head is a mixture of a streaming and a full one.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        settings: The method.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, settings: Duo) -> None:
        super().__init__(host_attention, layer_idx)
        self.settings = settings
        # float32 whatever the weights are: half types round small steps near 1 away.
        self.gates = nn.Parameter(torch.ones(self.num_key_value_heads, dtype=torch.float32))

    def gate_values(self, step: DuoStep | None = None) -> Tensor:
        """Gates ``(H_kv,)`` within 0 and 1."""
        noise = None
        if self.settings.gates == "hard_concrete" and step is not None and step.step is not None:
            row = torch.zeros(1, dtype=torch.long, device=self.gates.device)
            noise = keyed_logistic(row, step.seed, step.step, self.layer_idx, (self.num_key_value_heads, 1)).flatten()
        return gate_values(self.gates, self.settings.gates, noise)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``.

        ``context.step`` is a ``DuoStep``; without one gates are used as they are. ``context.outputs`` receives this
        layer's gates ``(H_kv,)`` as used and as stored, both with gradient, or in the teacher's pass what heads saw,
        ``(B, H, T, D)``, where ranks share rows this rank's.
        """
        step: DuoStep = context.step or DuoStep()
        query, key, value = self.project(hidden_states, position_embeddings, context.parallel)
        bits = None if self.training else self.settings.kv_bits
        key, value = read_back(key, bits), read_back(value, bits)
        patterns = AttentionPatterns.of(self.settings, self.scaling, context)
        if step.full_attention:
            output = self.with_sinks(patterns.full(query, key, value), context.parallel)[0]
            self._hand_out(output, context)
            return self.project_out(output, context.parallel), None
        gates = self.gate_values(step) if step.gates is None else step.gates[self.layer_idx]
        # A copy: where parameters are sharded, this one is gone when the loss looks at it.
        self._hand_out((gates, self.gates.clone()), context)
        gates = gates[context.parallel.own_heads(self.num_key_value_heads)]
        if step.teacher is None and self.sinks is None and not self.settings.compensation:
            output = patterns.mixed(query, key, value, gates)
        else:
            streaming = self.with_sinks(patterns.streaming(query, key, value), context.parallel)[0]
            if step.teacher is None:
                full = self.with_sinks(patterns.full(query, key, value), context.parallel)[0]
            else:
                full = step.teacher[self.layer_idx]
            output = mix_heads(streaming, full, gates)
        return self.project_out(output, context.parallel), None

    def _hand_out(self, what: Any, context: ForwardContext) -> None:
        if context.outputs is not None:
            context.outputs[self.layer_idx] = what


class RoundedAttention(HostAttention):
    """Full heads first, streaming heads behind them.

    Args:
        host_attention: The module to replace, its heads sorted.
        layer_idx: Its layer.
        settings: The method, with ``full_heads``.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, settings: Duo) -> None:
        super().__init__(host_attention, layer_idx)
        assert settings.full_heads is not None
        self.settings, self.num_full = settings, len(settings.full_heads[layer_idx])

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``."""
        query, key, value = self.project(hidden_states, position_embeddings, context.parallel)
        if context.cache is None:
            patterns = AttentionPatterns.of(self.settings, self.scaling, context)
            bits = None if self.training else self.settings.kv_bits
            key, value = read_back(key, bits), read_back(value, bits)
            attended = self._by_class(self._own_full(context), patterns.full, patterns.streaming, query, key, value)
        else:
            layer = context.cache_layer(self.layer_idx)
            assert isinstance(layer, StreamingCacheLayer)
            attended = self._serve(query, key, value, context, layer)
        output = self.with_sinks(attended, context.parallel)[0]
        return self.project_out(output, context.parallel), None

    @bookkeeping
    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext, layer: StreamingCacheLayer
    ) -> tuple[Tensor, Tensor]:
        """New tokens, one or many, over the slots before them."""
        assert context.cache is not None and context.valid is not None
        past, valid = context.cache.tokens, context.valid
        dropped = layer.drop(key, value, past, valid)
        if query.shape[2] == 1:
            layer.write(key, value, past, None if context.single else valid)
            return self._decode(query, layer, dropped)

        def full(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return self.attend_pages_and_new(query, key, value, context, layer.pages, heads=slice(self.num_full))

        def streaming(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            local = attend_cache_and_window(
                query,
                (key, value),
                layer.window(past),
                valid,
                window=layer.recent,
                sink=layer.sink,
                scale=self.scaling,
            )
            return local if dropped is None else add_compensation(local, query, dropped, self.scaling)

        read = (read_back(states, self.settings.kv_bits) for states in (key, value))
        attended = self._by_class(self.num_full, full, streaming, query, *read)
        layer.write(key, value, past, valid)
        return attended

    def _decode(self, query: Tensor, layer: StreamingCacheLayer, dropped: Dropped | None) -> tuple[Tensor, Tensor]:
        """One token a row, whose key and value the cache holds already."""
        output, lse = self.attend_pages(query, layer.pages)
        if dropped is None:
            return output, lse
        first = self.num_full * self.num_groups
        local = (output[:, first:], lse[:, first:])
        streaming = add_compensation(local, query[:, first:], dropped, self.scaling)
        return _side_by_side([(output[:, :first], lse[:, :first]), streaming])

    def _own_full(self, context: ForwardContext) -> int:
        """How many of the heads that this rank attends are full."""
        own = range(self.num_key_value_heads)[context.parallel.own_heads(self.num_key_value_heads)]
        return sum(head < self.num_full for head in own)

    def _by_class(
        self,
        num_full: int,
        full: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        window: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Full heads by one way and streaming heads by another, where there are such."""
        counts = (num_full * self.num_groups, num_full, num_full)
        heads = (query, key, value)
        parts = []
        if num_full:
            parts.append(full(*(tensor[:, :count] for tensor, count in zip(heads, counts, strict=True))))
        if num_full < key.shape[1]:
            parts.append(window(*(tensor[:, count:] for tensor, count in zip(heads, counts, strict=True))))
        return _side_by_side(parts)


def _side_by_side(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, h, T, D)`` and log-sum-exps ``(B, h, T)`` of all heads."""
    if len(parts) == 1:
        return parts[0]
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs, 1), torch.cat(sums, 1)
