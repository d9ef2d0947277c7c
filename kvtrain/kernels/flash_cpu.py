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
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
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
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    output = output if output.stride(-1) == 1 else output.contiguous()
    grads: tuple[Tensor, Tensor, Tensor] = _backward(
        grad_output, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return grads
