"""The chunked backend of ``kernels.attention``: any mask, any bias, any device.

Queries are taken in chunks, scores are recomputed in the backward pass, so memory grows with
``chunk x T`` and never with ``T x T``.  Shapes are those of ``kernels.attention``; c and k count the
queries and the keys of one chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.attention_mask import AttentionMask, biased_pairs, finite, visible_pairs
from kvtrain.kernels.cpu_tiling import spans
from kvtrain.kernels.dispatch import at_least_float32, autocast_off, wide_matmul

# Queries at a time; with a window a chunk wastes what its first query sees and its last does not.
_CHUNK, _CHUNK_IN_WINDOW = 256, 64


class _Chunk(NamedTuple):
    """A run of queries and the keys that any of them may see."""

    start: int
    stop: int
    columns: Tensor | None  # key indices, where they are not one run
    key_start: int
    key_stop: int

    def keys(self, tensor: Tensor, dim: int = 2) -> Tensor:
        if self.columns is not None:
            return tensor.index_select(dim, self.columns)
        return tensor.narrow(dim, self.key_start, self.key_stop - self.key_start)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        if self.columns is not None:
            total.index_add_(2, self.columns, part.to(total.dtype))
        else:
            total.narrow(2, self.key_start, self.key_stop - self.key_start).add_(part)


class _Problem:
    """Shapes and masks of one call; forward and backward share it."""

    def __init__(self, query: Tensor, key: Tensor, mask: AttentionMask, chunk_size: int | None) -> None:
        self.batch, self.heads, self.num_queries, self.dim = query.shape
        self.kv_heads, self.num_keys = key.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.offset = self.num_keys - self.num_queries
        self.device = query.device
        self.mask = mask
        self.chunk_size = chunk_size or (_CHUNK if mask.window is None else _CHUNK_IN_WINDOW)

    def chunks(self) -> list[_Chunk]:
        cuts = spans(max(self.num_queries, 1), self.chunk_size)
        return [self._chunk(cut.start, min(cut.stop, self.num_queries)) for cut in cuts]

    def _chunk(self, start: int, stop: int) -> _Chunk:
        causal, window = self.mask.causal, self.mask.window
        key_start, key_stop = 0, self.num_keys
        if causal:
            key_stop = max(0, stop + self.offset)
        if causal and window is not None:
            key_start = max(0, start + self.offset - window + 1)
        sinks = self._sinks_before(key_start, start, stop)
        if sinks is None:
            return _Chunk(start, stop, None, key_start, key_stop)
        if len(sinks) == key_start:
            return _Chunk(start, stop, None, 0, key_stop)
        run = torch.arange(key_start, key_stop, device=self.device)
        return _Chunk(start, stop, torch.cat([sinks, run]), 0, 0)

    def _sinks_before(self, key_start: int, start: int, stop: int) -> Tensor | None:
        """Keys before ``key_start`` that the window does not hide from the queries of a chunk, or None."""
        sinks = self.mask.sinks
        if sinks is None:
            count = min(self.mask.sink, key_start)
            return torch.arange(count, device=self.device) if count else None
        columns = sinks[:, :key_start].any(0).nonzero().squeeze(1)
        documents = self.mask.documents
        if documents is not None:
            shared = documents.queries[:, start:stop, None] == documents.keys[:, None, columns]  # (B, c, sinks)
            columns = columns[(shared.any(1) & sinks[:, columns]).any(0).nonzero().squeeze(1)]
        return columns if columns.numel() else None

    def fold(self, tensor: Tensor, chunk: _Chunk) -> Tensor:
        """Query-shaped ``(B, H, T, D)`` to this chunk's ``(B, H_kv, G * c, D)``."""
        part = tensor[:, :, chunk.start : chunk.stop]
        rows = self.groups * (chunk.stop - chunk.start)
        return part.reshape(self.batch, self.kv_heads, rows, tensor.shape[-1])

    def unfold(self, tensor: Tensor, chunk: _Chunk) -> Tensor:
        return tensor.reshape(self.batch, self.heads, chunk.stop - chunk.start, tensor.shape[-1])

    def positions(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        rows = torch.arange(chunk.start, chunk.stop, device=self.device)[:, None] + self.offset
        if chunk.columns is not None:
            return rows, chunk.columns
        return rows, torch.arange(chunk.key_start, chunk.key_stop, device=self.device)

    def unbiased(self, chunk: _Chunk) -> Tensor:
        """Pairs ``(c, k)`` that are too near for the bias to count."""
        return ~biased_pairs(*self.positions(chunk), self.mask)

    def bias_gradient(self, grad_scores: Tensor, chunk: _Chunk) -> Tensor:
        """Sum score gradients ``(B, H_kv, G, c, k)`` over the queries whose bias counts."""
        if self.mask.bias_after:
            grad_scores = grad_scores.masked_fill(self.unbiased(chunk), 0.0)
        return grad_scores.sum((2, 3))

    def hidden(self, chunk: _Chunk) -> Tensor | None:
        """Pairs that are out of sight, ``(B or 1, 1, 1, c, k)``; None where everything is visible."""
        documents = self.mask.documents
        if not self.mask.causal and documents is None:
            return None
        rows, columns = self.positions(chunk)
        sinks = None if self.mask.sinks is None else chunk.keys(self.mask.sinks, 1)[:, None]
        hidden = ~visible_pairs(rows, columns, self.mask, sinks)
        if documents is not None:
            queries = documents.queries[:, chunk.start : chunk.stop, None]
            hidden = hidden | (queries != chunk.keys(documents.keys, 1)[:, None])
        return (hidden if hidden.dim() == 3 else hidden[None])[:, None, None]

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None, scale: float, chunk: _Chunk) -> Tensor:
        """Masked, biased scores ``(B, H_kv, G, c, k)`` in at least float32."""
        raw = wide_matmul(self.fold(query, chunk), chunk.keys(key).mT).mul_(scale)
        rows = chunk.stop - chunk.start
        raw = raw.view(self.batch, self.kv_heads, self.groups, rows, raw.shape[-1])
        if bias is not None:
            addend = at_least_float32(chunk.keys(bias))[:, :, None, None, :]
            if self.mask.bias_after:
                addend = torch.where(self.unbiased(chunk), addend.new_zeros(()), addend)
            raw += addend
        hidden = self.hidden(chunk)
        return raw if hidden is None else raw.masked_fill_(hidden, float("-inf"))


class ChunkedAttention(torch.autograd.Function):
    """Forward keeps only output and log-sum-exp; backward recomputes the scores chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        mask: AttentionMask,
        scale: float,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, as ``kernels.attention`` says."""
        problem = _Problem(query, key, mask, chunk_size)
        output = value.new_empty((*query.shape[:3], value.shape[-1]))
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for chunk in problem.chunks():
            rows = slice(chunk.start, chunk.stop)
            scores = problem.scores(query, key, key_bias, scale, chunk)
            part_lse = torch.logsumexp(scores, dim=-1)  # (B, H_kv, G, c)
            weights = scores.sub_(finite(part_lse).unsqueeze(-1)).exp_().flatten(2, 3)
            output[:, :, rows] = problem.unfold(weights.to(value.dtype) @ chunk.keys(value), chunk)
            lse[:, :, rows] = part_lse.flatten(1, 2)
        ctx.save_for_backward(query, key, value, key_bias, output, lse)
        ctx.mask, ctx.scale, ctx.chunk_size = mask, scale, chunk_size
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors; the gradient of a gradient is refused."""
        with autocast_off(grad_output):
            grads = chunked_backward(ctx.saved_tensors, grad_output, grad_lse, ctx.mask, ctx.scale, ctx.chunk_size)
        return *grads, None, None, None


def chunked_backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    grad_output: Tensor,
    grad_lse: Tensor,
    mask: AttentionMask,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias from what any flash-like forward has saved.

    Args:
        saved: Query, key, value, bias (or None), output and log-sum-exp.
        grad_output: Gradient of the output, ``(B, H, T_q, D_v)``.
        grad_lse: Gradient of the log-sum-exp, ``(B, H, T_q)``.
        mask: As in the forward pass.
        scale: As in the forward pass.
        chunk_size: Queries per chunk; fewer with a window than without one where absent.
    """
    query, key, value, key_bias, output, lse = saved
    problem = _Problem(query, key, mask, chunk_size)
    delta = (at_least_float32(grad_output) * output).sum(-1) - grad_lse  # (B, H, T_q)
    grad_query = torch.empty_like(query)
    grad_key = torch.zeros_like(at_least_float32(key))
    grad_value = torch.zeros_like(at_least_float32(value))
    grad_bias = None if key_bias is None else torch.zeros_like(at_least_float32(key_bias))
    for chunk in problem.chunks():
        rows = slice(chunk.start, chunk.stop)
        scores = problem.scores(query, key, key_bias, scale, chunk)
        shape = (*scores.shape[:4], 1)
        weights = scores.sub_(finite(lse[:, :, rows]).reshape(shape)).exp_()
        grad_part = problem.fold(grad_output, chunk).to(value.dtype)
        chunk.add_keys(grad_value, weights.flatten(2, 3).to(value.dtype).mT @ grad_part)
        grad_scores = wide_matmul(grad_part, chunk.keys(value).mT).view_as(weights)
        grad_scores = grad_scores.sub_(delta[:, :, rows].reshape(shape)).mul_(weights)
        if grad_bias is not None:
            chunk.add_keys(grad_bias, problem.bias_gradient(grad_scores, chunk))
        flat = grad_scores.flatten(2, 3).to(query.dtype)
        grad_query[:, :, rows] = problem.unfold(flat @ chunk.keys(key), chunk).mul_(scale)
        chunk.add_keys(grad_key, (flat.mT @ problem.fold(query, chunk)).mul_(scale))
    grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
    return *grads, None if grad_bias is None or key_bias is None else grad_bias.to(key_bias.dtype)
