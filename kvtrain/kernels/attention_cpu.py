"""The CPU backend of ``kernels.attention``: torch's flash kernel, taught a key bias with a gradient and a strict mask.

The kernel knows causality, a mask without gradient and nothing else, so three things are put around it:

* a key bias travels as a channel, ``[q, 1] . [k, bias / scale]``: its gradient comes for free; one more channel, or
  the last where queries and keys leave that empty, as DMC does;
* a strict mask is the causal one on shifted queries;
* a bias on all keys but the token's own (``bias_after=1``) is the strict mask merged with the token's own key by
  log-sum-exp, and the backward pass hands the kernel the *merged* output and log-sum-exp, which is all that it needs to
  be exact. (To bias the own key, too, and then give back what was taken needs no shift, but a bias that is the next
  token's decision would reach this token's output as rounding.) A bias that begins further back runs in chunks: the
  keys between would be a band of their own, which the kernel can only mask.

Rows go a few at a time, which keeps them near the processor, and documents that are runs of tokens go one by one:
the kernel computes what a mask hides, and reads the mask besides.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.attention_chunked import chunked_backward
from kvtrain.kernels.attention_mask import AttentionMask, finite, visible_pairs
from kvtrain.kernels.cpu_tiling import row_tiles, tiles_to_run
from kvtrain.kernels.dispatch import at_least_float32, autocast_off, wide_dtype
from kvtrain.kernels.flash_cpu import flash, flash_backward

# Large enough that exp() of it is 0, small enough that no product of it with a score overflows.
_MASKED = -1e30
# A row is long for its window from this many windows on. The kernel computes every pair below the diagonal and masks
# most of them; chunks compute few pairs besides those that are seen, at a higher price a pair.
_NARROW_RATIO = 4

_QKV = tuple[Tensor, Tensor, Tensor]  # query, key and value


def flash_cpu_can_run(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, mask: AttentionMask) -> bool:
    """Whether this call fits the kernel: on the CPU, queries and keys the same tokens, no bias on their own keys."""
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float16
        and query.shape[-2:] == key.shape[-2:]
        and key.shape == value.shape
        and query.shape[-2] > 1
        and mask.causal
        and (mask.documents is None or mask.documents.same_tokens)
        and (key_bias is None or (mask.bias_after == 1 and not mask.strict))
    )


def is_narrow(mask: AttentionMask, length: int) -> bool:
    """Whether a window hides so much that the kernel, which skips nothing below the diagonal, loses to chunks."""
    return mask.window is not None and _NARROW_RATIO * (mask.window + mask.sink) <= length


def _additive_mask(query: Tensor, mask: AttentionMask) -> Tensor:
    """What the kernel adds to its scores, ``(B or 1, 1, T, T)``."""
    documents = mask.documents
    positions = torch.arange(query.shape[-2])
    sinks = None if mask.sinks is None else mask.sinks[:, None]
    visible = visible_pairs(positions[:, None], positions, mask, sinks)
    if documents is not None:
        visible = visible & (documents.queries[:, :, None] == documents.keys[:, None, :])
    additive = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
    return (additive if additive.dim() == 3 else additive[None]).unsqueeze(1)


# Index into (B, H, T, ...) of tokens that see none outside: a document of a row, or several whole rows. One call of the
# kernel each: it computes what a mask hides, so a mask for rows of several documents would cost the square of the row,
# and (B, 1, T, T) of memory besides.
_Segment = tuple[slice, slice, slice]
_ALL = slice(None)


def _segments(query: Tensor, mask: AttentionMask) -> tuple[list[_Segment], AttentionMask]:
    """What to attend to by itself, and the mask within each segment."""
    if mask.window is not None:  # its sinks are counted along the row
        return [(_ALL, _ALL, _ALL)], mask
    runs = [] if mask.documents is None else mask.documents.runs
    if runs is None:  # a document that was left comes again
        return [(_ALL, _ALL, _ALL)], mask
    within = mask._replace(documents=None)
    if max(map(len, runs), default=1) == 1:
        return [(rows, _ALL, _ALL) for rows in row_tiles(query)], within
    rows = tiles_to_run(range(len(runs)))
    return [(slice(row, row + 1), _ALL, tokens) for row in rows for tokens in runs[row]], within


class FlashAttentionCPU(torch.autograd.Function):
    """``attention`` on torch's CPU flash kernel; arguments as there."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        mask: AttentionMask,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, as ``kernels.attention`` says."""
        ctx.set_materialize_grads(False)
        segments, within = _segments(query, mask)
        output, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=wide_dtype(query.dtype))
        self_scores = None if key_bias is None else torch.empty_like(lse)
        for segment in segments:
            inputs = [None if tensor is None else tensor[segment] for tensor in (query, key, value, key_bias)]
            found = _attend(inputs, within, scale)
            for whole, part in zip((output, lse, self_scores), found, strict=True):
                if whole is not None and part is not None:
                    whole[segment] = part
        # Self scores are small beside queries and keys, all of which the backward pass would read to find them again.
        ctx.save_for_backward(query, key, value, key_bias, output, lse, self_scores)
        ctx.segments, ctx.within, ctx.mask, ctx.scale = segments, within, mask, scale
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors; the gradient of a gradient is refused."""
        saved = ctx.saved_tensors  # checkpointing allows a single look
        if grad_output is None:
            grad_output = torch.zeros_like(saved[4])
        with autocast_off(saved[0]):
            if grad_lse is not None:  # the kernel has no gradient of its log-sum-exp
                return *chunked_backward(saved[:-1], grad_output, grad_lse, ctx.mask, ctx.scale), None, None
            grads = [None if tensor is None else torch.empty_like(tensor) for tensor in saved[:4]]
            for segment in ctx.segments:
                known = [None if tensor is None else tensor[segment] for tensor in saved]
                found = _gradients(known, grad_output[segment], ctx.within, ctx.scale)
                for grad, part in zip(grads, found, strict=True):
                    if grad is not None and part is not None:
                        grad[segment] = part
        return *grads, None, None


def _attend(tensors: list[Any], mask: AttentionMask, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output and log-sum-exp of a segment's query, key, value and bias; with a bias, each token's score with itself."""
    query, key, value, bias = tensors
    additive = None if mask.documents is None and mask.window is None else _additive_mask(query, mask)
    if bias is None and not mask.strict:
        return *flash(query, key, value, causal=True, mask=additive, scale=scale), None
    output, lse = _strict(query, key, value, bias, additive, scale)
    if mask.strict:
        return output, lse, None
    self_scores = _self_scores(query, key, scale)
    return *_merge_self(self_scores, value, output, lse), self_scores


def _gradients(saved: list[Any], grad_output: Tensor, mask: AttentionMask, scale: float) -> list[Tensor | None]:
    """Gradients of a segment's query, key, value and bias."""
    query, key, value, bias, output, lse, self_scores = saved
    additive = None if mask.documents is None and mask.window is None else _additive_mask(query, mask)
    if bias is None and not mask.strict:
        known = (query, key, value, output, finite(lse))
        return [*flash_backward(grad_output, *known, causal=True, mask=additive, scale=scale), None]
    grads = _strict_backward(grad_output, query, key, value, bias, additive, output, lse, scale)
    if self_scores is not None:
        _add_self_backward(grads, grad_output, query, key, value, output, torch.exp(self_scores - lse), scale)
    return grads


def _mark_empty(lse: Tensor, additive: Tensor | None) -> Tensor:
    """The kernel reports 0 for a query that sees nothing; say ``-inf``."""
    if additive is None:
        return lse
    positions = torch.arange(additive.shape[-1])
    above = positions > positions[-additive.shape[-2] :, None]
    empty = ((additive == float("-inf")) | above).all(-1)  # (B or 1, 1, T)
    return lse.masked_fill(empty, float("-inf"))


def _append_bias_channel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> _QKV:
    """Carry the bias as the last channel of query and key; the value is padded because the kernel wants one D.

    The kernel's own mask would carry it, too, but as ``(B, H, T, T)`` and without a gradient.
    """
    if bias is None:
        return query, key, value
    dim = query.shape[-1]
    # DMC clears the channel that it reads its decisions from. To find that out takes far less than what it saves: with
    # a 33rd channel, and values padded to it, the packaged model's attention took 1.5 times as long forward.
    is_empty = not (query[..., -1].any() or key[..., -1].any())
    kept = dim - 1 if is_empty else dim
    channel = (bias.clamp(min=_MASKED) / scale).unsqueeze(-1).to(key.dtype)
    return (
        torch.cat([query[..., :kept], torch.ones_like(query[..., :1])], -1),
        torch.cat([key[..., :kept], channel], -1),
        value if is_empty else torch.nn.functional.pad(value, (0, 1)),
    )


def _shift_queries(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, additive: Tensor | None, scale: float
) -> tuple[_QKV, Tensor | None]:
    """Each query where the one before it stood, so that what the kernel calls causal is strict.

    Slices would say the same, queries 1.. and keys ..T-2, but the kernel is faster on whole tensors. The first query
    stands last, and what it finds is dropped.
    """
    parts = _append_bias_channel(query.roll(-1, 2), key, value, bias, scale)
    return parts, None if additive is None else additive.roll(-1, -2)


def _strict(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, additive: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to earlier keys alone; the first query sees none."""
    parts, additive = _shift_queries(query, key, value, bias, additive, scale)
    output, lse = flash(*parts, causal=True, mask=additive, scale=scale)
    output, lse = output[..., : value.shape[-1]].roll(1, 2), _mark_empty(lse, additive).roll(1, 2)
    output[:, :, 0], lse[:, :, 0] = 0, float("-inf")
    return output, lse


def _strict_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additive: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor | None]:
    parts, additive = _shift_queries(query, key, value, bias, additive, scale)
    dim = query.shape[-1]
    grad, out = grad_output.roll(-1, 2), output.roll(-1, 2)
    if parts[0].shape[-1] > dim:
        grad, out = (torch.nn.functional.pad(tensor, (0, 1)) for tensor in (grad, out))
    lse = finite(lse).roll(-1, 2)
    lse[:, :, -1] = -_MASKED  # all weights of the query that is dropped are exp(-1e30)
    # With the merged log-sum-exp the kernel's weights are shares of the whole softmax, and with the merged output its
    # ``grad . output`` is the whole one's: what it gives is the part of the gradients that goes through earlier keys.
    grads = flash_backward(grad, *parts, out, lse, causal=True, mask=additive, scale=scale)
    grad_bias = None
    if bias is not None:
        grad_bias = (grads[1][..., -1] / scale).to(bias.dtype)
        grads[0][..., -1], grads[1][..., -1] = 0, 0  # an empty channel of one side leaves the other without gradient
    return [grads[0][..., :dim].roll(1, 2), grads[1][..., :dim], grads[2][..., :dim], grad_bias]


def _self_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scores of each token with itself, ``(B, H, T)``: a product by elements, of which no matrix is made."""
    return (_grouped(query, key) * at_least_float32(key).unsqueeze(2)).sum(-1).flatten(1, 2) * scale


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """``(B, H, T, ...)`` to ``(B, H_kv, G, T, ...)`` in at least float32."""
    grouped: Tensor = at_least_float32(tensor).unflatten(1, (key.shape[1], tensor.shape[1] // key.shape[1]))
    return grouped


def _merge_self(self_scores: Tensor, value: Tensor, past: Tensor, past_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join each token's own key to what the past has given, as ``merge_attention`` would, in one interpolation."""
    lse = torch.logaddexp(past_lse, self_scores)
    weight = _grouped(torch.exp(self_scores - lse), value).unsqueeze(-1)
    merged = _grouped(past, value).lerp(at_least_float32(value).unsqueeze(2), weight)
    return merged.flatten(1, 2).to(value.dtype), lse


def _add_self_backward(
    grads: list[Tensor | None],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    weight: Tensor,
    scale: float,
) -> None:
    """Add the gradient through each token's own key, which ``weight`` went to; ``grads`` are q, k, v, bias."""
    grad_query, grad_key, grad_value = grads[:3]
    assert grad_query is not None and grad_key is not None and grad_value is not None
    weight = _grouped(weight, key).unsqueeze(-1)
    change = (at_least_float32(value).unsqueeze(2) - _grouped(output, key)).mul_(_grouped(grad_output, key))
    score = scale * weight * change.sum(-1, keepdim=True)  # its gradient
    weight, score = weight.to(query.dtype), score.to(query.dtype)
    groups = (key.shape[1], -1)
    # In place, and query head by query head where several share a key: nothing of the size of all heads is allocated.
    grad_query.unflatten(1, groups).addcmul_(key.unsqueeze(2), score)
    grouped = (query.unflatten(1, groups), grad_output.unflatten(1, groups), score, weight)
    for one_query, one_grad, one_score, one_weight in zip(*(tensor.unbind(2) for tensor in grouped), strict=True):
        grad_key.addcmul_(one_query, one_score)
        grad_value.addcmul_(one_grad, one_weight)
