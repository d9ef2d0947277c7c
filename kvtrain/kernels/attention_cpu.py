"""The CPU backend of ``kernels.attention``: torch's flash kernel, taught the open diagonal.

The kernel knows causality, a mask without gradient and nothing else, so three things are put around it:

* a key bias travels as one more channel, ``[q, 1] . [k, bias / scale]``: its gradient comes for free;
* a strict diagonal is the causal one on shifted slices (queries 1.., keys ..T-2), or on shifted queries;
* an open diagonal is the strict one merged with the token's own key by log-sum-exp, and the backward
  pass hands the kernel the *merged* output and log-sum-exp, which is all that it needs to be exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.attention_chunked import chunked_backward
from kvtrain.kernels.dispatch import at_least_float32, autocast_off
from kvtrain.kernels.visibility import Visibility, finite, visible_pairs

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Large enough that exp() of it is 0, small enough that no product of it with a score overflows.
_HIDDEN = -1e30
_NARROW = 4


def flash_cpu_can_run(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, visibility: Visibility
) -> bool:
    """Whether this call fits the kernel: on the CPU, queries and keys the same tokens, an exempt diagonal if biased."""
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float16
        and query.shape[-2:] == key.shape[-2:]
        and key.shape == value.shape
        and query.shape[-2] > 1
        and visibility.causal
        and visibility.query_documents is visibility.key_documents
        and (key_bias is None or visibility.diagonal == "open")
    )


def is_narrow(visibility: Visibility, length: int) -> bool:
    """Whether a window hides so much that the kernel, which skips nothing below the diagonal, loses to chunks."""
    return visibility.window is not None and _NARROW * (visibility.window + visibility.sink) <= length


def _mask(query: Tensor, visibility: Visibility) -> Tensor | None:
    """Additive ``(B or 1, 1, T, T)`` mask, or None where causality alone decides."""
    documents = visibility.query_documents
    if documents is not None and bool((documents == documents[:, :1]).all()):
        documents = None
    if documents is None and visibility.window is None:
        return None
    positions = torch.arange(query.shape[-2])
    sinks = None if visibility.sinks is None else visibility.sinks[:, None]
    visible = visible_pairs(positions[:, None], positions, visibility, sinks)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
    return (mask if mask.dim() == 3 else mask[None]).unsqueeze(1)


class FlashAttentionCPU(torch.autograd.Function):
    """``attention`` on torch's CPU flash kernel; arguments as there."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        visibility: Visibility,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, as ``kernels.attention`` says."""
        ctx.set_materialize_grads(False)
        mask = _mask(query, visibility)
        if visibility.diagonal == "plain" or (visibility.diagonal == "open" and key_bias is None):
            output, lse = _flash(query, key, value, 0.0, True, attn_mask=mask, scale=scale)
        else:
            output, lse = _strict(query, key, value, key_bias, mask, scale)
            if visibility.diagonal == "open":
                output, lse = _merge_own(query, key, value, output, lse, scale)
        ctx.save_for_backward(query, key, value, key_bias, mask, output, lse)
        ctx.visibility, ctx.scale = visibility, scale
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors; the gradient of a gradient is refused."""
        saved = ctx.saved_tensors  # checkpointing allows a single look
        with autocast_off(saved[0]):
            return *_gradients(saved, grad_output, grad_lse, ctx.visibility, ctx.scale), None, None


def _gradients(
    saved: tuple[Any, ...], grad_output: Tensor | None, grad_lse: Tensor | None, visibility: Visibility, scale: float
) -> list[Tensor | None]:
    """Gradients of query, key, value and bias."""
    query, key, value, key_bias, mask, output, lse = saved
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is not None:  # the kernel has no gradient of its log-sum-exp
        parts = (query, key, value, key_bias, output, lse)
        return list(chunked_backward(parts, grad_output, grad_lse, visibility, scale))
    if visibility.diagonal == "plain" or (visibility.diagonal == "open" and key_bias is None):
        grads = _flash_backward(
            grad_output, query, key, value, output, finite(lse), 0.0, True, attn_mask=mask, scale=scale
        )
        return [*grads, None]
    grads = _strict_backward(grad_output, query, key, value, key_bias, mask, output, lse, scale)
    if visibility.diagonal == "open":
        _add_own_backward(grads, grad_output, query, key, value, output, lse, scale)
    return list(grads)


def _mark_empty(lse: Tensor, mask: Tensor | None) -> Tensor:
    """The kernel reports 0 for a query that sees nothing; say ``-inf``."""
    if mask is None:
        return lse
    positions = torch.arange(mask.shape[-1])
    above = positions > positions[-mask.shape[-2] :, None]
    empty = ((mask == float("-inf")) | above).all(-1)  # (B or 1, 1, T)
    return lse.masked_fill(empty, float("-inf"))


def _with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """Carry the bias as channel D of query and key; the value is padded because the kernel wants one D."""
    if bias is None:
        return query, key, value
    channel = (bias.clamp(min=_HIDDEN) / scale).unsqueeze(-1).to(key.dtype)
    return (
        torch.cat([query, torch.ones_like(query[..., :1])], -1),
        torch.cat([key, channel], -1),
        torch.cat([value, torch.zeros_like(value[..., :1])], -1),
    )


def _strict_slices(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    past = None if bias is None else bias[..., :-1]
    parts = _with_bias(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], past, scale)
    return parts, None if mask is None else mask[..., 1:, :-1]


def _strict(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to earlier keys alone; the first query sees none."""
    if bias is None and mask is None:
        return _strict_rolled(query, key, value, scale)
    parts, mask = _strict_slices(query, key, value, bias, mask, scale)
    past, past_lse = _flash(*parts, 0.0, True, attn_mask=mask, scale=scale)
    past_lse = _mark_empty(past_lse, mask)
    output = torch.cat([torch.zeros_like(value[:, :1, :1]).expand_as(query[:, :, :1]), past[..., : query.shape[-1]]], 2)
    first = past_lse.new_full((*past_lse.shape[:2], 1), float("-inf"))
    return output, torch.cat([first, past_lse], 2)


def _strict_rolled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by one step that costs next to nothing: each query stands where the one before it stood.

    The kernel is faster on whole tensors than on slices. The first query stands last, and what it finds is dropped.
    """
    output, lse = _flash(query.roll(-1, 2), key, value, 0.0, True, scale=scale)
    output, lse = output.roll(1, 2), lse.roll(1, 2)
    output[:, :, 0], lse[:, :, 0] = 0, float("-inf")
    return output, lse


def _strict_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor | None]:
    parts, mask = _strict_slices(query, key, value, bias, mask, scale)
    pad = parts[0].shape[-1] - query.shape[-1]
    grad, out = (torch.nn.functional.pad(x[:, :, 1:], (0, pad)) for x in (grad_output, output))
    grads = _flash_backward(grad, *parts, out, finite(lse[:, :, 1:]), 0.0, True, attn_mask=mask, scale=scale)
    dim = query.shape[-1]
    grad_query = torch.nn.functional.pad(grads[0][..., :dim], (0, 0, 1, 0))
    grad_key = torch.nn.functional.pad(grads[1][..., :dim], (0, 0, 0, 1))
    grad_value = torch.nn.functional.pad(grads[2][..., :dim], (0, 0, 0, 1))
    grad_bias = None
    if bias is not None:
        grad_bias = torch.nn.functional.pad(grads[1][..., dim] / scale, (0, 1)).to(bias.dtype)
    return [grad_query, grad_key, grad_value, grad_bias]


def _own_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scores of each token with itself, ``(B, H, T)``."""
    return (_grouped(query, key) * at_least_float32(key).unsqueeze(2)).sum(-1).flatten(1, 2) * scale


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """``(B, H, T, ...)`` to ``(B, H_kv, G, T, ...)`` in at least float32."""
    grouped: Tensor = at_least_float32(tensor).unflatten(1, (key.shape[1], tensor.shape[1] // key.shape[1]))
    return grouped


def _merge_own(
    query: Tensor, key: Tensor, value: Tensor, past: Tensor, past_lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    own = _own_scores(query, key, scale)
    lse = torch.logaddexp(past_lse, own)
    own_weight = _grouped(torch.exp(own - lse), key).unsqueeze(-1)
    past_weight = _grouped(torch.exp(past_lse - lse), key).unsqueeze(-1)
    merged = _grouped(past, key) * past_weight + at_least_float32(value).unsqueeze(2) * own_weight
    return merged.flatten(1, 2).to(query.dtype), lse


def _add_own_backward(
    grads: list[Tensor | None],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Add the gradient that flows through each token's own key; ``grads`` are q, k, v, bias."""
    grad_query, grad_key, grad_value = grads[:3]
    assert grad_query is not None and grad_key is not None and grad_value is not None
    grad = _grouped(grad_output, key)
    weight = _grouped(torch.exp(_own_scores(query, key, scale) - lse), key).unsqueeze(-1)
    change = grad * (at_least_float32(value).unsqueeze(2) - _grouped(output, key))
    grad_score = weight * change.sum(-1, keepdim=True) * scale
    grad_query += (grad_score * at_least_float32(key).unsqueeze(2)).flatten(1, 2)
    grad_key += (grad_score * _grouped(query, key)).sum(2)
    grad_value += (weight * grad).sum(2)
