"""Two attentions for the price of one: a window with sinks, and everything, mixed head by head.

What a window shows and what it hides are disjoint, so attention over everything is both parts merged by their
log-sum-exp, and only the hidden part has to be computed besides. With ``w`` the window's share of the softmax,

    everything = w near + (1 - w) far,    mixed = (1 - a) near + a everything = near + a (1 - w) (far - near).

On one document the far part is plain causal attention of later queries on earlier keys, without a mask.

The plain way, attention under each mask and a mixture, computes the pairs within the window twice. Here each pair is
computed once, but for what chunks of the window waste.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_chunked import chunked_backward
from kvtrain.kernels.attention_cpu import flash_cpu_can_run
from kvtrain.kernels.attention_mask import AttentionMask
from kvtrain.kernels.dispatch import at_least_float32, autocast_off
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.flash_cpu import flash_backward


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    window: int,
    sink: int = 0,
    position_ids: Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """``(1 - gate) * window attention + gate * full attention``, both causal.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, T, D)``.
        value: ``(B, H_kv, T, D)``.
        gates: ``(H_kv,)``.
        window: Latest tokens that the window shows, the token's own included.
        sink: First tokens of each document that it shows as well.
        position_ids: ``(B or 1, T)`` within the documents; needed where there are documents.
        documents: Of queries and keys, the same tokens; None: every row is one document.
        scale: Factor on the scores, ``D ** -0.5`` by default.

    Returns:
        ``(B, H, T, D)`` in the query's dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    share = gates.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]  # (H, 1, 1)
    plain = documents is None and query.shape[2] > window + sink
    if plain and flash_cpu_can_run(query, key, value, None, AttentionMask()):
        with autocast_off(query):
            output: Tensor = _MixedOnCPU.apply(query, key, value, share, window, sink, scale)  # type: ignore[no-untyped-call]
        return output
    local, local_lse = window_attention(
        query, key, value, window=window, sink=sink, position_ids=position_ids, documents=documents, scale=scale
    )
    first, remote, remote_lse = _beyond(query, key, value, window, sink, position_ids, documents, scale)
    late = at_least_float32(local[:, :, first:])
    weight = _remote_weight(local_lse[:, :, first:], remote_lse)
    mixed = late + share * weight * (at_least_float32(remote) - late)
    return torch.cat([local[:, :, :first], mixed.to(query.dtype)], 2)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sink: int = 0,
    position_ids: Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the latest tokens of the document and to its first ones; arguments as in ``mixed_attention``.

    Returns:
        Output ``(B, H, T, D)`` and log-sum-exp ``(B, H, T)``.
    """
    if documents is None:
        return attention(query, key, value, window=window, sink=sink, scale=scale)
    return attention(
        query,
        key,
        value,
        window=window,
        sinks=_sinks(documents, position_ids, sink),
        documents=documents,
        scale=scale,
    )


def _sinks(documents: Documents, position_ids: Tensor | None, sink: int) -> Tensor:
    """The first tokens of each document, ``(B, T)``; the same tensor for all layers that have the same positions."""
    if position_ids is None:
        raise ValueError("rows of several documents need position_ids: their first tokens stay visible")
    return documents.keep(("sinks", position_ids, sink), lambda: (position_ids < sink).expand_as(documents.keys))


def _beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sink: int,
    position_ids: Tensor | None,
    documents: Documents | None,
    scale: float,
) -> tuple[int, Tensor, Tensor]:
    """Attention to what the window hides, of all queries from the first one on that may see any.

    Of one document sinks are cut off with the slices. Of several they may stand anywhere, and are hidden by a bias.
    """
    if documents is None:
        first = min(window + sink, query.shape[2])
        remote = _remote_slices(query, key, value, window, sink)
        return first, *attention(*remote, scale=scale)
    first = min(window, query.shape[2])
    hidden = torch.zeros_like(documents.keys, dtype=torch.promote_types(query.dtype, torch.float32))
    hidden = hidden.masked_fill(_sinks(documents, position_ids, sink), float("-inf"))[:, : -window or None]
    bias = hidden[:, None].expand(-1, key.shape[1], -1)
    remote = _remote_slices(query, key, value, window, 0)
    return first, *attention(*remote, key_bias=bias, documents=documents.part(first, remote[1].shape[2]), scale=scale)


def _remote_slices(query: Tensor, key: Tensor, value: Tensor, window: int, sink: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and the keys that the window hides from them, so shifted that plain causality is what is left.

    The first query here, token ``window + sink``, misses exactly the first key here, token ``sink``; each later query
    misses one key more. So both are as many, and a fast kernel needs no mask.
    """
    last = max(sink, query.shape[2] - window)
    return query[:, :, window + sink :], key[:, :, sink:last], value[:, :, sink:last]


def _remote_weight(local_lse: Tensor, remote_lse: Tensor) -> Tensor:
    """The far part's share of the softmax over both, ``(B, H, n, 1)``; 0 where there is none."""
    return torch.sigmoid(remote_lse.masked_fill(remote_lse == float("-inf"), -1e30) - local_lse).unsqueeze(-1)


class _MixedOnCPU(torch.autograd.Function):
    """One document a row, on torch's CPU flash kernel.

    The far part is differentiated through attention over everything: the kernel gets the merged output and
    log-sum-exp, and needs no gradient of its own log-sum-exp, which it does not have. Left to autograd, merging would
    ask for that gradient, and the chunked backward pass would compute the far part, which is most of the pairs.

    So three terms make the gradient: through everything, ``share`` of it, of which the kernel gives what goes through
    far keys; through the window's output, which gets the rest of it and the near part of everything; and through the
    window's log-sum-exp, which says how much of everything is near.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, share: Tensor, window: int, sink: int, scale: float
    ) -> Tensor:
        """As ``mixed_attention``; ``share (H, 1, 1)``."""
        local, local_lse = attention(query, key, value, window=window, sink=sink, scale=scale)
        first, remote, remote_lse = _beyond(query, key, value, window, sink, None, None, scale)
        late = at_least_float32(local[:, :, first:])
        full = late + _remote_weight(local_lse[:, :, first:], remote_lse) * (at_least_float32(remote) - late)
        ctx.save_for_backward(query, key, value, share, local, local_lse, full.to(query.dtype), remote_lse)
        ctx.window, ctx.sink, ctx.scale = window, sink, scale
        return torch.cat([local[:, :, :first], torch.lerp(late, full, share.to(full.dtype)).to(query.dtype)], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors; the gradient of a gradient is refused."""
        query, key, value, share, local, local_lse, full, remote_lse = ctx.saved_tensors
        first, late_lse = ctx.window + ctx.sink, local_lse[:, :, ctx.window + ctx.sink :]
        late = at_least_float32(grad[:, :, first:])
        # What a gate moves, from the window to everything, along the gradient: (B, H, n, 1).
        along = (late * (at_least_float32(full) - at_least_float32(local[:, :, first:]))).sum(-1, keepdim=True)
        grad_share = along.sum((0, 2), keepdim=True)[0].to(share.dtype)
        if not any(ctx.needs_input_grad[:3]):  # below the first gate of a frozen model nothing learns
            return None, None, None, grad_share, None, None, None
        local_share, share = 1 - _remote_weight(late_lse, remote_lse), share.to(late.dtype)  # of everything's softmax
        grad_local, grad_lse = grad.clone(), torch.zeros_like(local_lse)
        grad_local[:, :, first:] = (late * (1 - share + share * local_share)).to(grad.dtype)
        grad_lse[:, :, first:] = (-share * local_share * along).squeeze(-1)
        with autocast_off(grad):
            mask = AttentionMask(window=ctx.window, sink=ctx.sink)
            saved = (query, key, value, None, local, local_lse)
            grads = chunked_backward(saved, grad_local, grad_lse, mask, ctx.scale)[:3]
            slices = _remote_slices(query, key, value, ctx.window, ctx.sink)
            full_lse, grad_full = torch.logaddexp(late_lse, remote_lse), (share * late).to(query.dtype)
            remote = flash_backward(grad_full, *slices, full, full_lse, causal=True, mask=None, scale=ctx.scale)
        for part, more in zip(_remote_slices(*grads, ctx.window, ctx.sink), remote, strict=True):
            part += more
        return *grads, grad_share, None, None, None
