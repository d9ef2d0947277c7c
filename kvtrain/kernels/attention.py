"""Softmax attention for every architecture here.

On top of plain attention it knows what key-value compression needs: a bias per key that receives
gradients, a diagonal that is open (exempt from the bias) or closed (a token never sees itself),
windows with sinks, documents, and a log-sum-exp by which disjoint key sets are merged.

Backends: ``chunked`` runs any call anywhere (``attention_chunked.py``), ``flash_cpu`` is torch's
flash kernel for the CPU (``attention_cpu.py``), ``flash`` is the flash-attn library
(``attention_flash.py``) and ``flex`` torch's FlexAttention (``attention_flex.py``), both on CUDA,
``reference`` is the dense definition below.
Shapes: B rows, H query heads, H_kv key-value heads, T_q queries, T_k keys, D channels.
"""

import torch
from torch import Tensor

from kvtrain.kernels.attention_chunked import CHUNK, CHUNK_IN_WINDOW, ChunkedAttention
from kvtrain.kernels.attention_cpu import FlashAttentionCPU, flash_cpu_can_run, is_narrow
from kvtrain.kernels.attention_flash import flash_attend, flash_can_run
from kvtrain.kernels.attention_flex import flex_attend, flex_can_run
from kvtrain.kernels.dispatch import at_least_float32, autocast_off, choose_backend
from kvtrain.kernels.visibility import Diagonal, Visibility, finite, log_sum_exp, visible_pairs


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    causal: bool = True,
    diagonal: Diagonal = "plain",
    window: int | None = None,
    sink: int = 0,
    sinks: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
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
        diagonal: ``"plain"``; ``"open"``: the bias does not touch a token's own key (DMC);
            ``"closed"``: a token never sees its own key (LCKV).
        window: Number of latest keys that are visible, the token's own included.
        sink: First keys that stay visible beyond the window.
        sinks: ``(B, T_k)``, keys that stay visible beyond the window, where they are not the first of each row.
        query_documents: ``(B, T_q)`` integer ids; a query sees keys of its own document alone.
        key_documents: ``(B, T_k)``; the same tensor where queries and keys are the same tokens.
        scale: Factor on the scores, ``D ** -0.5`` by default.
        chunk_size: Queries per chunk of the chunked backend; fewer in a window than without one where absent.
        backend: ``"auto"``, the first of these that can run the call: ``"flash_cpu"`` (not in a narrow window),
            ``"flash"``, ``"flex"``, ``"chunked"``; or one of them by name, or ``"reference"`` (dense, for tests).

    Returns:
        Output ``(B, H, T_q, D_v)`` in the query's dtype and log-sum-exp ``(B, H, T_q)`` in at least
        float32. A query that sees no key gets zeros and ``-inf``.

    Raises:
        ValueError: Head counts or visibility do not fit, or the backend cannot run this call.
    """
    check_groups(query.shape[1], key.shape[1])
    visibility = Visibility(causal, diagonal, window, sink, query_documents, key_documents, sinks)
    visibility.validate()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    fast = {
        "flash_cpu": flash_cpu_can_run(query, key, value, key_bias, visibility),
        "flash": flash_can_run(query, key, value, key_bias, visibility),
        "flex": flex_can_run(query, key, value),
    }
    available = [*(name for name, can_run in fast.items() if can_run), "chunked", "reference"]
    if is_narrow(visibility, query.shape[-2]):
        available.sort(key="flash_cpu".__eq__)  # to the end
    chosen = choose_backend("attention", backend, available)
    output: tuple[Tensor, Tensor]
    with autocast_off(query):
        if chosen == "reference":
            output = attention_reference(query, key, value, key_bias, visibility, scale)
        elif chosen == "flash_cpu":
            output = FlashAttentionCPU.apply(query, key, value, key_bias, visibility, scale)  # type: ignore[no-untyped-call]
        elif chosen == "flash":
            output = flash_attend(query, key, value, visibility, scale)
        elif chosen == "flex":
            output = flex_attend(query, key, value, key_bias, visibility, scale)
        else:
            chunk_size = chunk_size or (CHUNK if window is None else CHUNK_IN_WINDOW)
            output = ChunkedAttention.apply(query, key, value, key_bias, visibility, scale, chunk_size)  # type: ignore[no-untyped-call]
    return output


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


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    visibility: Visibility,
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
        exempt = (rows == columns) & (visibility.diagonal == "open")
        scores = torch.where(exempt, scores, scores + bias)
    sinks = None if visibility.sinks is None else visibility.sinks[:, None]
    visible = visible_pairs(rows, columns, visibility, sinks)
    if visibility.query_documents is not None and visibility.key_documents is not None:
        visible = visible & (visibility.query_documents[:, :, None] == visibility.key_documents[:, None, :])
    scores = scores.masked_fill(~(visible if visible.dim() == 2 else visible[:, None]), float("-inf"))
    lse = log_sum_exp(scores, -1)
    weights = torch.exp(scores - finite(lse).unsqueeze(-1))
    return (weights @ at_least_float32(value)).to(query.dtype), lse
