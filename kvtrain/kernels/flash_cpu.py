"""Torch's flash kernel for the CPU and its backward pass, as they are, for tensors that lie anyhow.

The kernel reads queries, keys, values and output as if the channels of a vector lay side by side in memory, does not
look whether they do, and then computes something else without a word. The other strides, the mask, the log-sum-exp and
the incoming gradient it honours.
"""

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend, without a gradient.

    Args:
        query: ``(B, H, T_q, D)``.
        key: ``(B, H_kv, T_k, D)``.
        value: ``(B, H_kv, T_k, D)``.
        causal: Query ``i`` sees key ``j`` only if ``j <= i``.
        mask: Added to the scores, in their dtype, ``(B or 1, H or 1, T_q, T_k)``.
        scale: Factor on the scores.

    Returns:
        Output ``(B, H, T_q, D)`` and log-sum-exp ``(B, H, T_q)``, which is 0 where a query sees nothing.
    """
    query, key, value = _side_by_side(query, key, value)
    result: tuple[Tensor, Tensor] = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return result


def flash_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from what ``flash`` has given; the other arguments are as there.

    Args:
        grad_output: ``(B, H, T_q, D)``.
        query: As in the forward pass.
        key: Likewise.
        value: Likewise.
        output: What the forward pass gave.
        lse: Likewise, finite.
        causal: As in the forward pass.
        mask: Likewise.
        scale: Likewise.
    """
    query, key, value, output = _side_by_side(query, key, value, output)
    grads: tuple[Tensor, Tensor, Tensor] = _backward(
        grad_output, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return grads


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """The tensors, or copies whose last axis has stride 1."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
