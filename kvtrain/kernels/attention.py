"""Softmax attention for every architecture here.

On top of plain attention it knows what key-value compression needs: a bias per key that receives
gradients and may begin some tokens back, a strict mask (a token never sees its own key), windows with
sinks, documents, and a log-sum-exp by which disjoint key sets are merged.

Backends: ``chunked`` runs any call anywhere (``attention_chunked.py``), ``flash_cpu`` is torch's
flash kernel for the CPU (``attention_cpu.py``), ``flash`` is the flash-attn library
(``attention_flash.py``) and ``flex`` torch's FlexAttention (``attention_flex.py``), both on CUDA,
``reference`` is the dense definition below.
Shapes: B rows, H query heads, H_kv key-value heads, T_q queries, T_k keys, D channels.
"""

import torch
from torch import Tensor

from kvtrain.kernels.attention_chunked import ChunkedAttention
from kvtrain.kernels.attention_cpu import FlashAttentionCPU, flash_cpu_can_run, is_narrow
from kvtrain.kernels.attention_flash import flash_attend, flash_can_run
from kvtrain.kernels.attention_flex import flex_attend, flex_can_run
from kvtrain.kernels.attention_mask import AttentionMask, biased_pairs, finite, log_sum_exp, visible_pairs
from kvtrain.kernels.dispatch import at_least_float32, autocast_off, choose_backend
from kvtrain.kernels.documents import Documents


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    causal: bool = True,
    strict: bool = False,
    bias_after: int = 0,
    window: int | None = None,
    sink: int = 0,
    sinks: Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend, and return the log-sum-exp with the output; both are differentiable.

    Args:
        query: ``(B, H, T_q, D)``.
        key: ``(B, H_kv, T_k, D)``; ``H`` must be a multiple of ``H_kv``.
        value: ``(B, H_kv, T_k, D_v)``.
        key_bias: ``(B, H_kv, T_k)`` added to the scores of each key, ``-inf`` hides it.
        causal: Query ``i`` sees key ``j`` only if ``j <= i + T_k - T_q``.
        strict: A token never sees its own key (LCKV).
        bias_after: How many tokens back the key bias begins: a query at key position ``p`` is not touched by that of
            the keys ``p - bias_after + 1`` to ``p``. 0: every key's bias counts; 1: all but the token's own (DMC).
        window: Number of latest keys that are visible, the token's own included.
        sink: First keys that stay visible beyond the window.
        sinks: ``(B, T_k)``, keys that stay visible beyond the window, where they are not the first of each row.
        documents: A query sees keys of its own document alone; None: every row is one.
        scale: Factor on the scores, ``D ** -0.5`` by default.
        chunk_size: Queries per chunk of the chunked backend; fewer in a window than without one where absent.
        backend: ``"auto"``, the first of these that can run the call: ``"flash_cpu"`` (not in a narrow window),
            ``"flash"``, ``"flex"``, ``"chunked"``; or one of them by name, or ``"reference"`` (dense, for tests).

    Returns:
        Output ``(B, H, T_q, D_v)`` in the query's dtype and log-sum-exp ``(B, H, T_q)`` in at least
        float32. A query that sees no key gets zeros and ``-inf``.

    Raises:
        ValueError: Head counts or mask do not fit, or the backend cannot run this call.
    """
    check_groups(query.shape[1], key.shape[1])
    mask = AttentionMask(causal, strict, bias_after, window, sink, documents, sinks).validated()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend("attention", backend, tuple(_available(query, key, value, key_bias, mask)))
    with autocast_off(query):
        if chosen == "reference":
            output = attention_reference(query, key, value, key_bias, mask, scale)
        elif chosen == "flash_cpu":
            output = FlashAttentionCPU.apply(query, key, value, key_bias, mask, scale)  # type: ignore[no-untyped-call]
        elif chosen == "flash":
            output = flash_attend(query, key, value, mask, scale)
        elif chosen == "flex":
            output = flex_attend(query, key, value, key_bias, mask, scale)
        else:
            output = ChunkedAttention.apply(query, key, value, key_bias, mask, scale, chunk_size)  # type: ignore[no-untyped-call]
    return output


def _available(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, mask: AttentionMask) -> list[str]:
    """Backends that can run this call, best first."""
    can_run = {
        "flash_cpu": flash_cpu_can_run(query, key, value, key_bias, mask),
        "flash": flash_can_run(query, key, value, key_bias, mask),
        "flex": flex_can_run(query, key, value),
        "chunked": True,
        "reference": True,
    }
    if is_narrow(mask, query.shape[-2]):  # it still can, but the chunks are faster: last
        can_run["flash_cpu"] = can_run.pop("flash_cpu")
    return [name for name, can in can_run.items() if can]


def check_groups(num_heads: int, num_key_value_heads: int) -> None:
    """Refuse head counts that do not group.

    Raises:
        ValueError: The first is no multiple of the second.
    """
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_key_value_heads} key-value heads; "
            "the first must be a multiple of the second"
        )


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint key sets into attention over their union.

    Args:
        parts: Pairs of output ``(B, H, T, D)`` and log-sum-exp ``(B, H, T)`` as ``attention`` returns.

    Returns:
        Such a pair; a query that no part shows a key gets zeros and ``-inf``.
    """
    lse = torch.stack([part_lse for _, part_lse in parts])
    total = log_sum_exp(lse, 0)
    weights = torch.exp(lse - finite(total)).unsqueeze(-1)
    outputs = torch.stack([at_least_float32(output) for output, _ in parts])
    return (weights * outputs).sum(0).to(parts[0][0].dtype), total


def add_sinks(part: tuple[Tensor, Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Let all queries of a head see one more key, whose score is learned and whose value is zero (gpt-oss).

    Args:
        part: Output ``(B, H, T, D)`` and log-sum-exp ``(B, H, T)`` of attention to all other keys.
        scores: ``(H,)``.

    Returns:
        Such a pair; the output of a query that sees no other key stays zero.
    """
    output, lse = part
    total = torch.logaddexp(lse, scores.to(lse.dtype)[:, None])
    weight = torch.exp(lse - total).unsqueeze(-1)  # at least float32, as the product is: it is rounded once
    return (output * weight).to(output.dtype), total


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, dense and by autograd; ``attention`` says what the arguments mean."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = at_least_float32(query) @ at_least_float32(key).mT * scale
    num_queries, num_keys = scores.shape[-2:]
    rows = torch.arange(num_queries, device=query.device)[:, None] + num_keys - num_queries
    columns = torch.arange(num_keys, device=query.device)
    if key_bias is not None:
        bias = key_bias.repeat_interleave(groups, 1).unsqueeze(-2)
        biased = scores + bias
        scores = torch.where(biased_pairs(rows, columns, mask), biased, scores) if mask.bias_after else biased
    sinks = None if mask.sinks is None else mask.sinks[:, None]
    visible = visible_pairs(rows, columns, mask, sinks)
    if mask.documents is not None:
        visible = visible & (mask.documents.queries[:, :, None] == mask.documents.keys[:, None, :])
    scores = scores.masked_fill(~(visible if visible.dim() == 2 else visible[:, None]), float("-inf"))
    lse = log_sum_exp(scores, -1)
    weights = torch.exp(scores - finite(lse).unsqueeze(-1))
    return (weights @ at_least_float32(value)).to(query.dtype), lse
