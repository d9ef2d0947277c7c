"""DMS's attention: one form for training and parallel evaluation, one for serving, the same numbers.

A token decides whether the token before it is marked. A marked one is seen by the ``window`` tokens after it, and by
none that come later: ``k`` is visible to ``q`` if ``q - k <= window``, or else if token ``k + 1`` has not marked it.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvtrain.cache.rows import bookkeeping
from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.context_parallel import ContextParallel
from kvtrain.kernels.dispatch import at_least_float32, autocast_off
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.noise import keyed_logistic
from kvtrain.kernels.quantization import read_back
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.dms.cache import DMSCacheLayer, LeavingSlots
from kvtrain.models.dms.config import DMS
from kvtrain.models.gating import Decisions, DecisionStep, decide, decide_hard, has_choice, next_token
from kvtrain.models.modules import RMSNorm

# Tokens of a prompt that go through a layer at a time: what has left by then is never attended again. On a CPU 8,192
# tokens at 8 for each that stays took a sixth of the time that they take at once, and blocks of half or twice the size
# as long.
BLOCK = 512

logger = logging.getLogger("kvtrain")


@dataclass(frozen=True, kw_only=True)
class DMSStep(DecisionStep):
    """What a training step says to every DMS attention.

    Args:
        full_attention: The pass of the teacher: nothing is marked.
        channel_scale: While a borrowed channel is freed the factor on it, which then decides nothing; None otherwise.
    """

    full_attention: bool = False
    channel_scale: float | None = None


class Block(NamedTuple):
    """New tokens that go through a layer together.

    Attributes:
        columns: Where in the pass they stand.
        valid: ``(B, n)`` which of them are real; padding stands before them.
        past: ``(B,)`` tokens before them.
        documents: Real ones belong together, and so does padding.
    """

    columns: slice
    valid: Tensor
    past: Tensor
    documents: Documents


class DecisionProjection(nn.Module):
    """To one number a key-value head, 0 at first; computed in at least float32, whatever the weights are.

    Args:
        hidden_size: Channels of the input.
        num_heads: Key-value heads.
        bias: Whether there is one.
    """

    def __init__(self, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_heads)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(B, T, hidden)`` to ``(B, T, H_kv)``."""
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        with autocast_off(hidden_states):
            return linear(hidden_states, self.weight.to(hidden_states.dtype), bias)


class DMSAttention(HostAttention):
    """Attention whose keys may be marked, and then leave.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        settings: The method.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, settings: DMS) -> None:
        super().__init__(host_attention, layer_idx)
        self.settings = settings
        if settings.decide_by == "adapter":  # by the names of the released code
            hidden_size, has_bias = self.config.hidden_size, self.q_proj.bias is not None
            self.dms_proj_alpha_norm = RMSNorm(LlamaRMSNorm(hidden_size, self.config.rms_norm_eps))
            self.dms_proj_alpha = DecisionProjection(hidden_size, self.num_key_value_heads, has_bias)

    def borrowed_rows(self) -> dict[str, slice]:
        """See ``BorrowsChannel``; of the first query head of every group."""
        if self.settings.decide_by != "query_channel":
            return {}
        return {"q_proj": slice(self.head_dim - 1, None, self.num_groups * self.head_dim)}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Angles,
        context: ForwardContext,
        residual: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``.

        ``residual (B, T, hidden)`` is what enters the layer, which adapters read. ``context.step`` is a ``DMSStep``;
        without one decisions are soft and noiseless in training mode, hard in evaluation mode. ``context.outputs``
        receives the decisions ``(B, H_kv, T)``, straight-through, whole even where ranks share rows.
        """
        step: DMSStep | None = context.step
        freeing = None if step is None else step.channel_scale
        query, key, value, logits = self._project(
            hidden_states, residual, position_embeddings, freeing, context.parallel
        )
        if not self.training:
            key, value = (read_back(states, self.settings.kv_bits) for states in (key, value))
        if step is not None and (step.full_attention or freeing is not None):
            output = self.attend_documents(query, key, value, context)
        elif context.cache is None:
            if self.training and step is None:
                _say_untargeted()
            decisions = self._decide(logits, context, step)
            if context.outputs is not None:
                context.outputs[self.layer_idx] = context.parallel.all_heads(decisions.straight_through())
            output = self._parallel(query, key, value, decisions, context)
        else:
            output = self._serve(query, key, value, logits, context)
        return self.project_out(output, context.parallel), None

    def _project(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        angles: Angles,
        freeing: float | None,
        parallel: ContextParallel,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated queries and keys, values, and logits of decisions ``(B, H_kv, T)``, without noise.

        A borrowed channel is cleared behind the norm, and again behind RoPE, in which its partner leaks into it. While
        it is being freed it shrinks before the norm, which then adapts, so that zeroing the projection's rows
        afterwards changes nothing.
        """
        borrows = self.settings.decide_by == "query_channel"
        query = self.split_heads(self.q_proj(hidden))
        if freeing is not None:
            query = self._scale_channel(query, freeing)
        query, key = self.normalize(query, self.split_heads(self.k_proj(hidden)))
        read = query[:, :: self.num_groups, :, -1] if borrows else self._adapter(residual)
        logits = self.settings.decision_scale * at_least_float32(read) - self.settings.init_bias
        if self.settings.shared_decisions:
            logits = logits[:, :1].expand_as(logits)
        query, key, value = parallel.to_heads(query, key, self.split_heads(self.v_proj(hidden)))
        (logits,) = parallel.to_heads(logits.unsqueeze(-1))
        if borrows and freeing is None:
            query = self._scale_channel(query, 0.0)
        query, key = (apply_rotary(heads, *angles, halves_repeat=True) for heads in (query, key))
        if borrows:
            query = self._scale_channel(query, freeing or 0.0)
        return query, key, value, logits.squeeze(-1)

    def _adapter(self, residual: Tensor | None) -> Tensor:
        """What decisions are read from, ``(B, H_kv, T)``."""
        assert residual is not None, "the layer hands it on"
        read: Tensor = self.dms_proj_alpha(self.dms_proj_alpha_norm(at_least_float32(residual)))
        return read.transpose(1, 2)

    def _scale_channel(self, query: Tensor, scale: float) -> Tensor:
        """Queries ``(B, H, T, D)`` with a factor on the last channel of the first head of every group."""
        factors = torch.ones(query.shape[1], 1, self.head_dim, dtype=query.dtype, device=query.device)
        factors[:: self.num_groups, :, -1] = scale
        return query * factors

    def _decide(self, logits: Tensor, context: ForwardContext, step: DMSStep | None) -> Decisions:
        """Decisions of all tokens ``(B, H_kv, T)``: soft with noise in training mode, hard in evaluation mode."""
        never = context.keep("without a choice", lambda: _without_choice(context, logits))
        if not self.training:
            return decide(logits, never=never)
        if step is not None and step.row_ids is not None:
            heads = 1 if self.settings.shared_decisions else self.num_key_value_heads
            own = slice(None) if heads == 1 else context.parallel.own_heads(heads)
            shape = (heads, logits.shape[2])
            logits = logits + keyed_logistic(step.row_ids, step.seed, step.step, self.layer_idx, shape, own)
        return decide(logits, never=never, temperature=self.settings.temperature)

    def _parallel(
        self, query: Tensor, key: Tensor, value: Tensor, decisions: Decisions, context: ForwardContext
    ) -> Tensor:
        """All tokens at once: what is marked fades, or is hidden, from where the window ends."""
        reaches = query.shape[2] > self.settings.window + 1  # no row is long enough otherwise
        attended = attention(
            query,
            key,
            value,
            key_bias=next_token(decisions.keep_bias()) if reaches else None,
            bias_after=self.settings.window + 1,
            documents=context.documents,
            scale=self.scaling,
        )
        return self.with_sinks(attended, context.parallel)[0]

    @bookkeeping
    def _serve(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, context: ForwardContext) -> Tensor:
        """New tokens, one or many, over the slots before them; leaves the cache as one by one would."""
        layer, valid = context.cache_layer(self.layer_idx), context.valid
        assert isinstance(layer, DMSCacheLayer) and context.cache is not None and valid is not None
        past = context.cache.tokens.to(query.device)
        real = valid.unsqueeze(1)
        marks = decide_hard(logits, ~real | (past[:, None, None] + real.cumsum(-1) == 1)) > 0  # not by a row's first
        if query.shape[2] == 1:
            layer.write_token(key, value, marks.squeeze(-1), past, None if context.single else valid)
            return self.with_sinks(self.attend_pages(query, layer.pages))[0]
        outputs = []
        for block in context.keep("blocks", lambda: _blocks(past, valid)):
            own = (slice(None), slice(None), block.columns)
            outputs.append(self._serve_block(query[own], key[own], value[own], marks[own], block, layer))
        return torch.cat(outputs, 2)

    def _serve_block(
        self, query: Tensor, key: Tensor, value: Tensor, marks: Tensor, block: Block, layer: DMSCacheLayer
    ) -> Tensor:
        """Several new tokens ``(B, H, n, D)`` over themselves, and over what is left of those before them."""
        first = (block.valid & (block.valid.cumsum(-1) == 1)).unsqueeze(1)  # each row's first real token here
        leaving = layer.advance((marks & first).any(-1), block.past, block.valid)
        marked = next_token(marks)
        parts = [self._attend_new(query, key, value, marked, block.documents)]
        if layer.pages.table.shape[2]:
            parts.append(self.attend_pages(query, layer.pages))
        if leaving is not None:
            parts.append(self._attend_leaving(query, leaving))
        layer.append(key, value, marked, block.past, block.valid)
        return self.with_sinks(merge_attention(parts) if len(parts) > 1 else parts[0])[0]

    def _attend_new(
        self, query: Tensor, key: Tensor, value: Tensor, marked: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        """New tokens over themselves, those that are marked hidden where the window has ended."""
        reaches = query.shape[2] > self.settings.window + 1
        return attention(
            query,
            key,
            value,
            key_bias=_hiding(marked, query) if reaches else None,
            bias_after=self.settings.window + 1,
            documents=documents,
            scale=self.scaling,
        )

    def _attend_leaving(self, query: Tensor, leaving: LeavingSlots) -> tuple[Tensor, Tensor]:
        """New tokens over slots that leave while they pass: query ``i`` sees columns from ``i`` on.

        Backwards that is what kernels call causal, where the first of these queries sees no more than the last column.
        """
        output, lse = attention(
            query.flip(2),
            leaving.keys.flip(2),
            leaving.values.flip(2),
            key_bias=_hiding(~leaving.present, query).flip(2),
            scale=self.scaling,
        )
        return output.flip(2), lse.flip(2)


def _blocks(past: Tensor, valid: Tensor) -> list[Block]:
    """The blocks of a pass whose tokens ``valid (B, n)`` follow ``past (B,)``."""
    blocks = []
    for start in range(0, valid.shape[1], BLOCK):
        columns = slice(start, start + BLOCK)
        inside = valid[:, columns]
        blocks.append(Block(columns, inside, past, Documents(inside.long())))
        past = past + inside.sum(1)
    return blocks


def _hiding(hidden: Tensor, like: Tensor) -> Tensor:
    """The bias of keys ``(B, H_kv, T)`` of which some are hidden, in at least float32."""
    bias = torch.zeros(hidden.shape, dtype=at_least_float32(like[..., :0]).dtype, device=hidden.device)
    return bias.masked_fill(hidden, float("-inf"))


def _without_choice(context: ForwardContext, logits: Tensor) -> Tensor:
    """Tokens ``(B, 1, T)`` that mark nothing: padding, and the first of every document."""
    documents = context.documents
    one = torch.ones_like(logits[:, 0], dtype=torch.long)
    return ~has_choice(one if documents is None else documents.queries)[:, None]


@functools.cache
def _say_untargeted() -> None:
    """Say once that the training loop around this model is none of kvtrain's."""
    logger.warning(
        "this training gives DMS no target: decisions stay soft and noiseless, and nothing pulls on their rate; train "
        "them with `kvtrain fit` (recipes/tiny/dms.yaml), and use other loops on what it exports, if at all"
    )
