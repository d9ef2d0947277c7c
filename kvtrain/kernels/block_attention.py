"""Attention within blocks of tokens that do not overlap (TransNormer's DiagAttention, arXiv 2210.10340, section 4.2).

A token sees its own block alone, causally those before it there: n / w products of w x w, in place of one of n x n.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention

Weights = Literal["softmax", "relu"]
_NOWHERE = -1  # block of a column that is none


class Past(NamedTuple):
    """Keys and values of tokens before the input.

    Attributes:
        keys: ``(B, H, S, D)``.
        values: ``(B, H, S, D)``.
        block_ids: ``(B, S)``; -1 for what is none.
    """

    keys: Tensor
    values: Tensor
    block_ids: Tensor


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    weights: Weights = "softmax",
    causal: bool = True,
    block_ids: Tensor | None = None,
    past: Past | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within blocks, scores scaled by the root of D.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D)``.
        block_size: Tokens of a block, w.
        weights: ``"softmax"``, or ``"relu"``: positive scores as they are.
        causal: Whether a token sees none after it.
        block_ids: ``(B, T)``, not negative: tokens of one block lie side by side, at most w of them. None: blocks begin
            at every w-th token.
        past: Tokens before these, with ``block_ids``; causal alone.
        dropout: Share of the weights that are dropped.

    Returns:
        ``(B, H, T, D)``.
    """
    if block_ids is None:
        assert past is None, "where blocks of earlier tokens end must be said"
        return _aligned(query, key, value, block_size, weights, causal, dropout)
    size = min(block_size, query.shape[2])
    folded = [_fold(tensor, size) for tensor in (query, key, value)]  # (B, H, N, w, D)
    ids = _fold(block_ids[:, None, :, None], size, _NOWHERE)[:, 0, :, :, 0]  # (B, N, w)
    beside = (-1, 0) if causal else (-1, 0, 1)
    shifts = [shift for shift in beside if abs(shift) < ids.shape[1]]
    keys, values = (torch.cat([_shift(tensor, shift) for shift in shifts], 3) for tensor in folded[1:])
    key_ids = torch.cat([_shift(ids[:, None, :, :, None], shift, _NOWHERE)[:, 0, :, :, 0] for shift in shifts], 2)
    visible = ids[..., :, None] == key_ids[..., None, :]  # (B, N, w, k)
    if causal:  # what stands in earlier columns always is
        width = visible.shape[-1] - size
        visible = visible & torch.ones_like(visible[0, 0]).tril(width)
    if past is not None:
        keys, values, visible = _with_past(keys, values, visible, ids, past)
    output = _attend(folded[0], keys, values, visible[:, None], weights, dropout)
    return output.flatten(2, 3)[:, :, : query.shape[2]]


def _aligned(
    query: Tensor, key: Tensor, value: Tensor, size: int, weights: Weights, causal: bool, dropout: float
) -> Tensor:
    """Blocks that begin at every ``size``-th token; the last one, cut short, by itself, so that nothing is padded."""
    whole = query.shape[2] // size * size
    outputs = []
    for begin, end, width in ((0, whole, size), (whole, query.shape[2], query.shape[2] - whole)):
        if begin < end:
            q, k, v = (tensor[:, :, begin:end].unflatten(2, (-1, width)) for tensor in (query, key, value))
            outputs.append(_attend(q, k, v, None, weights, dropout, causal).flatten(2, 3))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    weights: Weights,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Attention of ``(B, H, N, w, D)``, what is visible given as a mask ``(B, 1, N, w, k)`` or by ``causal``."""
    if weights == "softmax":
        # Torch's fast kernels take four axes. A padded column sees padded columns, so no row is without a key.
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        mask = None if visible is None else visible.transpose(1, 2).flatten(0, 1)
        flat: Tensor = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        output: Tensor = flat.unflatten(0, (query.shape[0], -1)).transpose(1, 2)
        return output
    scores = (query * query.shape[-1] ** -0.5 @ key.mT).relu()
    if causal:
        scores = scores.tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, 0.0)
    return drop(scores, dropout) @ value


def _with_past(keys: Tensor, values: Tensor, visible: Tensor, ids: Tensor, past: Past) -> tuple[Tensor, Tensor, Tensor]:
    """Put earlier tokens before the keys of every column of blocks."""
    blocks = ids.shape[1]
    earlier = [tensor[:, :, None].expand(-1, -1, blocks, -1, -1).to(keys) for tensor in (past.keys, past.values)]
    seen = (ids[..., None] == past.block_ids[:, None, None]) & (ids[..., None] != _NOWHERE)
    return torch.cat([earlier[0], keys], 3), torch.cat([earlier[1], values], 3), torch.cat([seen, visible], -1)


def _fold(tensor: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """``(B, H, T, D)`` in blocks of columns ``(B, H, N, size, D)``, filled up at the end."""
    length = tensor.shape[2]
    folded: Tensor = pad(tensor, (0, 0, 0, -length % size), value=fill).unflatten(2, (-1, size))
    return folded


def _shift(folded: Tensor, blocks: int, fill: float = 0.0) -> Tensor:
    """For every block of ``(B, H, N, w, D)`` the one so many further; empty ones come in."""
    if blocks == 0:
        return folded
    first, last = (1, 0) if blocks < 0 else (0, 1)
    kept = folded[:, :, :-1] if blocks < 0 else folded[:, :, 1:]
    return pad(kept, (0, 0, 0, 0, first, last), value=fill)
