"""Attention probabilities of keys that lie on pages, read where they lie; ``attention_scores.py`` says what they are.

Every page is a block of a tile: its keys are multiplied in place with the queries of the head that owns it, as in a
decode step, which has few queries, and in a block of some dozens of new tokens. Keys that must be widened, dequantized
or picked from a pool that others own most of are copied a scratchful at a time.

Shapes as there; R is ``B * H_kv``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvtrain.kernels.attention import check_groups
from kvtrain.kernels.attention_scores import NEVER, AttentionTile, tile_size
from kvtrain.kernels.dispatch import autocast_off, wide_dtype
from kvtrain.kernels.page_layout import PageLayout
from kvtrain.kernels.quantization import dequantize

_SCRATCH_BYTES = 2**21  # of keys that are copied, widened or dequantized at a time, unless a single page takes more


@torch.no_grad()
def paged_tiles(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    scale: float,
    table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    key_positions: Tensor | None = None,
    bits: int | None = None,
    layout: PageLayout | None = None,
) -> Iterator[AttentionTile]:
    """Probabilities of queries over the first ``lengths`` slots of their row and head, where those lie.

    Args:
        query: ``(B, H, n, D)``.
        keys: ``(pages, page_size, D)``, or with ``bits`` what ``quantize`` makes of that.
        lse: ``(B, H, n)`` over all that each query sees, be it here or elsewhere.
        scale: Factor on the scores.
        table: ``(B, H_kv, P)`` pages of each head in order, -1 where there is none; no page has two owners.
        lengths: ``(B, H_kv)`` slots that count.
        positions: ``(B, n)`` of the queries in their row; -1 for padding, which may hold whatever and has
            weights of 0.
        key_positions: ``(pages, page_size)`` of the keys: a query sees none after its own. None: it sees all.
        bits: Of quantized keys.
        layout: Of ``table.flatten(0, 1)``, from a caller that keeps it for as long as the table stays the same.

    Returns:
        Tiles whose blocks are pages; together, every visible pair once.

    Raises:
        ValueError: With the first tile: head counts or bits do not fit.
    """
    check_groups(query.shape[1], table.shape[1])
    if layout is None:
        layout = PageLayout(table.flatten(0, 1), len(keys), keys.shape[1], copies=bits is not None)
    assert not layout.fixed, "it lists some pages twice, of which fields would be written twice"
    if not query.numel():
        return
    wide, places = wide_dtype(query.dtype), _key_positions(key_positions, layout, lengths)  # (N, S)
    positions = positions.int()
    by_head = (len(query) * table.shape[1], query.shape[1] // table.shape[1], query.shape[2], -1)
    scaled, minus_lse = (query.to(wide) * scale).reshape(by_head), -lse.to(wide).reshape(by_head)  # (R, G, n, D or 1)
    in_place = layout.pages is None and bits is None and keys.dtype == wide
    cuts = _paged_cuts(places.shape, scaled.shape, tile_size(keys.device), 0 if in_place else wide.itemsize)
    for some, queries in cuts:
        owner, index = layout.owner[some], some if layout.pages is None else layout.pages[some]
        at, keys_at = positions[owner // table.shape[1], queries], places[some]
        vectors, offsets = (part[:, :, queries].index_select(0, owner).flatten(1, 2) for part in (scaled, minus_lse))
        with autocast_off(query):
            scores = torch.baddbmm(offsets, vectors, _read(keys, index, bits, query.shape[3], wide).mT)
        scores = scores.view(len(owner), scaled.shape[1], -1, keys.shape[1])
        later = keys_at.unsqueeze(1) > at.unsqueeze(2)  # (N, c, S)
        weights = scores.masked_fill_(later.unsqueeze(1), -torch.inf).exp_()
        yield AttentionTile(weights, at, keys_at, owner, queries, index)


def _read(keys: Tensor, index: Tensor | slice, bits: int | None, dim: int, dtype: torch.dtype) -> Tensor:
    """Keys ``(N, S, D)`` of some pages: where they lie, if they can be used as they are."""
    keys = keys[index] if isinstance(index, slice) else keys.index_select(0, index)
    return keys.to(dtype) if bits is None else dequantize(keys, bits, dim, dtype)


def _key_positions(key_positions: Tensor | None, layout: PageLayout, lengths: Tensor) -> Tensor:
    """Those of the layout's pages, ``(N, S)``; ``NEVER`` where a slot is none of its owner's."""
    hidden = layout.shown(lengths).hidden.slots
    if key_positions is None:
        return torch.zeros_like(hidden, dtype=torch.int32).masked_fill_(hidden, NEVER)
    listed = key_positions if layout.pages is None else key_positions[layout.pages]
    return listed.int().masked_fill(hidden, NEVER)


def _paged_cuts(pages: torch.Size, queries: torch.Size, tile: int, copied_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Pages and queries of each tile.

    Args:
        pages: ``(N, S)`` of all pages that are listed.
        queries: ``(R, G, n, D)``.
        tile: Probabilities at most, unless those of one query over a page are more.
        copied_bytes: Of each channel of a key, if keys are copied.
    """
    (count, size), (_, groups, num_queries, dim) = pages, queries
    chunk = min(num_queries, max(1, tile // (groups * size)))
    step = tile // (groups * chunk * size)
    if copied_bytes:
        step = min(step, _SCRATCH_BYTES // (size * dim * copied_bytes))
    step = max(1, step)
    for page in range(0, count, step):
        for first in range(0, num_queries, chunk):
            yield slice(page, page + step), slice(first, min(first + chunk, num_queries))
