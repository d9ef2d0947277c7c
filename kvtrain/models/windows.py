"""New tokens over a window of which a cache holds the beginning."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvtrain.cache.ring import RingStore
from kvtrain.kernels.attention import attention
from kvtrain.kernels.documents import Documents
from kvtrain.models.ordering import padding_first, take_slots


def attend_cache_and_window(
    query: Tensor,
    new: Sequence[Tensor],
    held: Sequence[Tensor],
    valid: Tensor,
    *,
    window: int,
    sink: int = 0,
    visible: Tensor | None = None,
    strict: bool = False,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Several new tokens a row, each over the first tokens of its row and over the latest ones before it.

    Args:
        query: ``(B, H, n, D)``.
        new: Keys and values ``(B, H_kv, n, D)`` of the new tokens.
        held: Keys and values ``(B, H_kv, S, D)`` of earlier tokens, and their positions ``(B, S)``, -1 where there is
            none. Tokens of the window stand in order, nothing but such gaps between them; sinks stand anywhere.
        valid: ``(B, n)`` real tokens; in every row the padding stands before them.
        window: Latest tokens that a token sees, its own included.
        sink: First tokens of the row that it sees as well.
        visible: ``(B, n)`` new tokens that may be seen; those in ``valid`` where absent.
        strict: A token does not see its own key.
        scale: Factor on the scores.

    Returns:
        Output ``(B, H, n, D)`` and log-sum-exp ``(B, H, n)``; zeros and ``-inf`` where a token sees nothing.
    """
    keys, values, positions = held
    visible = valid if visible is None else visible
    there = positions >= 0
    keys, values = (torch.cat([old.to(query.dtype), more], 2) for old, more in zip((keys, values), new, strict=True))
    documents = torch.cat([there, visible], 1)
    sinks = torch.cat([there & (positions < sink), torch.zeros_like(valid)], 1) if sink else None
    real = torch.cat([there, valid], 1)
    if sinks is not None:  # the new tokens may be among the first, too
        seen = positions.amax(1, keepdim=True).clamp(min=-1) + 1 if positions.shape[1] else 0
        sinks[:, positions.shape[1] :] = valid & (seen + valid.cumsum(1) - 1 < sink)
    if not bool(real.all()):  # padding would count as part of the window: it goes first
        order = padding_first(real)
        keys, values, documents = take_slots(keys, order), take_slots(values, order), documents.gather(1, order)
        sinks = None if sinks is None else sinks.gather(1, order)
    return attention(
        query,
        keys,
        values,
        strict=strict,
        window=window,
        sinks=sinks,
        documents=Documents(valid.long(), documents.long()),
        scale=scale,
    )


def attend_ring(ring: RingStore, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """New tokens, as many in every row, over what a ring holds and over each other; the ring takes them up.

    Args:
        ring: Of the rows.
        query: ``(B, H, n, D)``.
        key: ``(B, H_kv, n, D)``.
        value: ``(B, H_kv, n, D)``.
        scale: Factor on the scores.

    Returns:
        ``(B, H, n, D)``.
    """
    if query.shape[2] == 1:
        ring.write(key, value, None)  # over a token that is out of the window
        keys, values, positions = ring.gather()
        there = (positions >= 0)[:, None, None]
        return scaled_dot_product_attention(query, keys, values, attn_mask=there, scale=scale, enable_gqa=True)
    valid = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool)
    keys, values, positions = ring.gather()
    order = positions.argsort(1)
    held = take_slots(keys, order), take_slots(values, order), positions.gather(1, order)
    window, sink = ring.recent, ring.sink
    output, _ = attend_cache_and_window(query, (key, value), held, valid, window=window, sink=sink, scale=scale)
    ring.write(key, value, valid)
    return output
