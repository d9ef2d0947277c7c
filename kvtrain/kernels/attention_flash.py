"""The flash-attn backend of ``kernels.attention``: calls on CUDA whose mask is causality and perhaps a window.

A strict mask is the causal one on shifted slices (queries 1.., keys ..T-2). The library has no gradient of its
log-sum-exp; where a loss depends on it, that part of the gradient is computed by the chunked backend.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.attention_chunked import chunked_backward
from kvtrain.kernels.attention_mask import AttentionMask
from kvtrain.kernels.dispatch import autocast_off

_MAX_CHANNELS = 256
_DTYPES = (torch.float16, torch.bfloat16)


def flash_can_run(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, mask: AttentionMask) -> bool:
    """Whether this call fits the library: half types on CUDA, no bias, no documents, no sink, and no blind query."""
    return (
        _on_gpu(query)
        and _is_installed()
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and query.shape[-1] <= _MAX_CHANNELS
        and query.numel() > 0
        and key.numel() > 0
        and key_bias is None
        and mask.documents is None
        and (mask.window is None or (mask.sink == 0 and mask.sinks is None))
        and _shows_keys(mask, query.shape[-2], key.shape[-2])
    )


def _shows_keys(mask: AttentionMask, num_queries: int, num_keys: int) -> bool:
    """Whether every query sees a key, the first one of a strict mask aside."""
    if mask.strict:
        return num_queries == num_keys > 1 and mask.window != 1
    return not mask.causal or num_queries <= num_keys


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _on_gpu(tensor: Tensor) -> bool:
    """The library's kernels begin with Ampere."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def flash_attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, both differentiable, as ``kernels.attention`` says."""
    plain = mask._replace(strict=False)
    if not mask.strict:
        return _attend(query, key, value, plain, scale)
    if plain.window is not None:
        plain = plain._replace(window=plain.window - 1)
    output, lse = _attend(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], plain, scale)
    pad = torch.nn.functional.pad
    return pad(output, (0, 0, 1, 0)), pad(lse, (1, 0), value=float("-inf"))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    window = (-1, -1) if mask.window is None else (mask.window - 1, 0)
    output, lse, _ = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        softmax_scale=scale,
        causal=mask.causal,
        window_size=window,
        return_attn_probs=True,
    )
    output = output.transpose(1, 2)
    lse = _LogSumExp.apply(query, key, value, output.detach(), lse.detach(), mask, scale)  # type: ignore[no-untyped-call]
    return output, lse


class _LogSumExp(torch.autograd.Function):
    """Hands a log-sum-exp through and gives it its gradient, at a cost only where a loss depends on it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        mask: AttentionMask,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.mask, ctx.scale = mask, scale
        return lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        saved = (query, key, value, None, output, lse)
        with autocast_off(query):
            grads = chunked_backward(saved, torch.zeros_like(output), grad_lse, ctx.mask, ctx.scale)
        return *grads[:2], None, None, None, None, None
