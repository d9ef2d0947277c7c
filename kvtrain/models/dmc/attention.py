"""DMC's attention: one form for training and parallel evaluation, one for serving, the same numbers.

The last channel of keys and queries is borrowed (it turns slowest under RoPE). A key's
channel decides whether its token merges into the slot before it; the queries' channel says how much the
token counts in the slot's mean. Keys are pooled before rotation and rotate at their last token.
"""

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.cache.rows import bookkeeping
from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.context_parallel import ContextParallel
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.noise import keyed_logistic
from kvtrain.kernels.pooling import pool_segments
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.dmc.cache import DMCCacheLayer
from kvtrain.models.dmc.config import DMC
from kvtrain.models.gating import Decisions, DecisionStep, decide, decide_hard, has_choice, next_token

# Keeps importances away from 0. One constant for every dtype, so that a model trained in bfloat16 serves
# the same in float32; it is bfloat16's own epsilon, which the released checkpoints used.
IMPORTANCE_FLOOR = 2.0**-7

logger = logging.getLogger("kvtrain")


@dataclass(frozen=True, kw_only=True)
class DMCStep(DecisionStep):
    """What a training step says to every DMC attention; random decisions merge at the rate of ``compression``.

    Args:
        channel_scale: In the zero-out phase the factor on the borrowed channel, which then decides
            nothing; None in the others.
    """

    channel_scale: float | None = None


class DMCAttention(HostAttention):
    """Attention over slots that merge.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        settings: The method.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, settings: DMC) -> None:
        super().__init__(host_attention, layer_idx)
        self.settings = settings

    def borrowed_rows(self) -> dict[str, slice]:
        """See ``BorrowsChannel``; of every query and key head."""
        rows = slice(self.head_dim - 1, None, self.head_dim)
        return {"q_proj": rows, "k_proj": rows}

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``.

        ``context.step`` is a ``DMCStep``; without one decisions are soft and noiseless in training mode, hard in
        evaluation mode. ``context.outputs`` receives the decisions ``(B, H_kv, T)``, straight-through, whole even
        where ranks share rows.
        """
        step: DMCStep | None = context.step
        if self.training and step is None:
            _say_untargeted()
        scale = None if step is None else step.channel_scale
        query, key, value = self._project(hidden_states, scale, context.parallel)
        if scale is not None:
            query = self._scale_channel(apply_rotary(query, *position_embeddings), scale)
            key = self._scale_channel(apply_rotary(key, *position_embeddings), scale)
            return self.project_out(self.attend_documents(query, key, value, context), context.parallel), None
        angles = context.keep("angles without the borrowed channel", lambda: _without_channel(position_embeddings))
        if context.cache is None:
            attended, decisions = self._parallel(query, key, value, angles, context)
            if context.outputs is not None:
                context.outputs[self.layer_idx] = context.parallel.all_heads(decisions.straight_through())
        else:
            attended = self._serve(query, key, value, angles, context)
        output = self.with_sinks(attended, context.parallel)[0]
        return self.project_out(output, context.parallel), None

    def _project(self, hidden: Tensor, scale: float | None, parallel: ContextParallel) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values; in the zero-out phase the borrowed channel shrinks before any norm.

        Shrinking it *before* a query or key norm lets the norm adapt, so that zeroing the projection's
        rows afterwards changes nothing.
        """
        query, key = self.split_heads(self.q_proj(hidden)), self.split_heads(self.k_proj(hidden))
        if scale is not None:
            query, key = self._scale_channel(query, scale), self._scale_channel(key, scale)
        query, key = self.normalize(query, key)
        query, key, value = parallel.to_heads(query, key, self.split_heads(self.v_proj(hidden)))
        return query, key, value

    def _scale_channel(self, heads: Tensor, scale: float) -> Tensor:
        factors = torch.ones(self.head_dim, dtype=heads.dtype, device=heads.device)
        factors[-1] = scale
        return heads * factors

    def _borrow(
        self, query: Tensor, key: Tensor, context: ForwardContext, step: DMCStep | None
    ) -> tuple[Tensor, Tensor]:
        """Read the borrowed channel: decision logits, noise included, and importances ``(B, H_kv, T)``."""
        bias = self.settings.init_bias
        logits = self.settings.decision_scale * at_least_float32(key[..., -1]) - bias
        if self.settings.decisions == "random":
            rate = self.settings.compression if step is None or step.compression is None else step.compression
            logits = torch.full_like(logits, math.log(max(rate - 1.0, 1e-9)))
        if self.settings.shared_decisions:
            logits = context.parallel.all_heads(logits).mean(1, keepdim=True).expand_as(logits)
        wish = at_least_float32(query[..., -1]).unflatten(1, (key.shape[1], -1)).mean(2)
        noise = self._noise(logits.shape, context, step)
        return logits if noise is None else logits + noise, torch.sigmoid(wish + bias) + IMPORTANCE_FLOOR

    def _noise(self, shape: torch.Size, context: ForwardContext, step: DMCStep | None) -> Tensor | None:
        """Logistic noise ``(B, H_kv or 1, T)`` of a training step; that of random decisions otherwise."""
        heads = 1 if self.settings.shared_decisions else self.num_key_value_heads
        own = slice(None) if heads == 1 else context.parallel.own_heads(heads)
        if self.training:
            if step is None or step.row_ids is None:
                return None
            return keyed_logistic(step.row_ids, step.seed, step.step, self.layer_idx, (heads, shape[2]), own)
        if self.settings.decisions == "learned":
            return None
        places = context.positions.expand(shape[0], -1).flatten()
        by_token = keyed_logistic(places, 0, 0, self.layer_idx, (heads, 1), own)
        return by_token.view(shape[0], shape[2], -1).transpose(1, 2)

    def _parallel(
        self, query: Tensor, key: Tensor, value: Tensor, angles: Angles, context: ForwardContext
    ) -> tuple[tuple[Tensor, Tensor], Decisions]:
        """All tokens at once: every intermediate slot exists, and hides once its successor has merged."""
        logits, importance = self._borrow(query, key, context, context.step)
        never = context.keep("bound to append", lambda: _bound_to_append(context.documents, logits))
        decisions = decide(logits, never=never, temperature=self.settings.temperature if self.training else None)
        key, value = self._pool(key, value, decisions.values, importance)
        attended = attention(
            apply_rotary(query, *angles),
            apply_rotary(key, *angles),
            value,
            key_bias=next_token(decisions.keep_bias()),
            bias_after=1,
            documents=context.documents,
            scale=self.scaling,
        )
        return attended, decisions

    def _pool(self, key: Tensor, value: Tensor, merge: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        pooled = pool_segments(torch.cat([key, value], -1), merge, importance, self.settings.window)
        keys, values = pooled.split(self.head_dim, -1)
        return keys, values

    @bookkeeping
    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, angles: Angles, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """New tokens, one or many, over the slots before them; leaves the cache as one by one would."""
        layer, valid = context.cache_layer(self.layer_idx), context.valid
        assert isinstance(layer, DMCCacheLayer) and valid is not None
        logits, importance = self._borrow(query, key, context, None)
        closed, known = ~layer.is_open()[..., None], None if context.single else valid
        if known is None:
            merge = decide_hard(logits, closed)
        else:
            first = valid & (valid.cumsum(-1) == 1)  # (B, n), each row's first real token here
            merge = decide_hard(logits, (~valid)[:, None] | (first[:, None] & closed))
        pooled = layer.extend_segment(torch.cat([key, value], -1), merge, importance, known)
        keys, values = pooled.split(self.head_dim, -1)
        query, keys = apply_rotary(query, *angles), apply_rotary(keys, *angles)
        if query.shape[2] == 1:
            layer.write(keys, values, merge, known)
            return self.attend_pages(query, layer.pages)
        bias = torch.zeros_like(merge).masked_fill(next_token(merge) > 0, float("-inf"))
        parts = [
            attention(
                query,
                keys,
                values,
                key_bias=bias,
                bias_after=1,
                documents=context.entering(),
                scale=self.scaling,
            )
        ]
        if layer.pages.table.shape[2]:
            # A slot that the first of these tokens has merged into is seen as it is now, among the new keys.
            absorbed = (merge * first[:, None]).amax(-1).long()
            parts.append(self.attend_pages(query, layer.pages, layer.pages.lengths - absorbed))
        layer.write(keys, values, merge, valid)
        return merge_attention(parts) if len(parts) > 1 else parts[0]


@functools.cache
def _say_untargeted() -> None:
    """Say once that the training loop around this model is none of kvtrain's."""
    logger.warning(
        "this training gives DMC no target: decisions stay soft and noiseless, and nothing pulls on their rate; train "
        "them with `kvtrain fit` (recipes/tiny/dmc.yaml), and use other loops on what it exports, if at all"
    )


def _bound_to_append(documents: Documents | None, logits: Tensor) -> Tensor:
    """Tokens ``(B, 1, T)`` without a choice: padding, and the first of every document."""
    one = torch.ones_like(logits[:, 0], dtype=torch.long)
    return ~has_choice(one if documents is None else documents.queries)[:, None]


def _without_channel(angles: Angles) -> Angles:
    """Angles that rotate as if the last channel were cleared before and after.

    The channel turns with the last of the first half. Its own row of both angles becomes 0, which clears it
    after rotation; its partner's sine becomes 0, which keeps it from leaking in.
    """
    cos, sin = angles[0].clone(), angles[1].clone()
    half = cos.shape[-1] // 2
    cos[..., -1] = 0
    sin[..., [half - 1, -1]] = 0
    return cos, sin
