"""Attention probabilities without ``[T, T]``: recomputed from the log-sum-exp that attention has returned.

``exp(q . k * scale - lse)`` is the probability itself, whichever of the keys are looked at and whoever has computed the
log-sum-exp over all of them. Probabilities come in tiles of bounded size, of keys that lie dense or on pages, and a
tile knows which slots it speaks of: what is accumulated by slot need not know where the keys lie.

Of dense keys the causal half is skipped: a run of keys meets only the queries from its first key on. The log-sum-exp
travels as a channel, ``[q * scale, -lse] . [k, 1]``, so that one product gives the exponent; padding likewise, as
``-inf``.

Nothing here has a gradient. On CUDA these are plain products, where a fused kernel would keep a tile on the chip. Until
there is one, the backward pass of any flash attention gives the same sums there: with ``dO = w``, the weight of each
query in every channel, each channel of ``dV`` is the sum over queries of their probabilities by weight. That is exact,
and takes 2.6 times the forward pass on a CPU.

Shapes: B rows, H query heads, H_kv key-value heads of G query heads each, n queries, T keys, D channels. A tile has N
blocks of S slots, each of one head, and c of the queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.attention import check_groups
from kvtrain.kernels.dispatch import autocast_off, wide_dtype

TILE = 2**20  # probabilities at a time, 4 MiB of float32, unless a query has more over one block of every head
_RUN = 64  # dense keys of a block where the diagonal crosses it: what it hides there is computed, too
NEVER = 2**31 - 1  # position of a slot that no query sees


def tile_size(device: torch.device) -> int:
    """Probabilities of a tile; launches cost more than memory where there is an accelerator."""
    return TILE if device.type == "cpu" else 32 * TILE


@dataclass(frozen=True, eq=False)
class AttentionTile:
    """Probabilities of some queries over some slots, and where the slots lie.

    What is kept by slot is a *field*: ``(pages, page_size)`` of the pool that the keys are on, or ``(B, H_kv, T)``
    beside dense keys. The methods read and write the tile's part of it.

    Attributes:
        weights: ``(N, G, c, S)`` in at least float32; 0 where a query does not see a slot.
        positions: ``(N, c)`` of the queries in their row; -1 for padding.
        key_positions: ``(N, S)`` from which on queries see a slot; beyond all where it holds no key of the owner's.
        owner: ``(N,)`` head that each block belongs to, ``row * H_kv + head``.
        queries: Which of the n queries these are.
        index: What picks the tile's slots from a field.
    """

    weights: Tensor
    positions: Tensor
    key_positions: Tensor
    owner: Tensor
    queries: slice
    index: Any

    @cached_property
    def visible(self) -> Tensor:
        """Which slots a query sees, ``(N, c, S)``."""
        return self.key_positions.unsqueeze(1) <= self.positions.unsqueeze(2)

    @cached_property
    def live(self) -> Tensor:
        """Slots that hold a key of their owner's, ``(N, S)``."""
        return self.key_positions < NEVER

    def column_sums(self, query_weights: Tensor | None = None) -> Tensor:
        """What the queries of the tile give to each slot, those of all G heads together, ``(N, S)``.

        Args:
            query_weights: ``(B, H, n)`` factors on all the n queries, finite where those are padding; 1 by default.
        """
        by_query = self.weights.flatten(1, 2)  # (N, G * c, S)
        if query_weights is None:
            return by_query.sum(1)
        factors = query_weights.reshape(-1, self.weights.shape[1], query_weights.shape[2])
        factors = factors[:, :, self.queries][self.owner].flatten(1).unsqueeze(1)  # (N, 1, G * c)
        with autocast_off(by_query):
            sums = torch.bmm(factors.to(by_query.dtype), by_query)
        return sums.squeeze(1)

    def read(self, field: Tensor) -> Tensor:
        """What a field has for the tile's slots, ``(N, S)``."""
        part: Tensor = field[self.index]
        return part.reshape(self.key_positions.shape)

    def add(self, field: Tensor, values: Tensor) -> None:
        """Add ``values (N, S)``, which are 0 where a slot is not ``live``, as sums of weights are."""
        part = field[self.index]
        field[self.index] = part + values.view(part.shape)

    def put(self, field: Tensor, values: Tensor, where: Tensor | None = None) -> None:
        """Write ``values (N, S)`` for the live slots; of others a field keeps what it has.

        Args:
            field: Is changed.
            values: In any dtype.
            where: Of the live ones those alone, broadcast to ``(N, S)``.
        """
        chosen = self.live if where is None else self.live & where
        part = field[self.index]
        field[self.index] = torch.where(chosen, values.to(field.dtype), part.reshape(chosen.shape)).view(part.shape)

    def maximum(self, field: Tensor, values: Tensor) -> None:
        """Let live slots have the larger one of what they have and ``values (N, S)``."""
        self.put(field, torch.maximum(self.read(field), values.to(field.dtype)))


@torch.no_grad()
def dense_tiles(
    query: Tensor, key: Tensor, lse: Tensor, scale: float, *, positions: Tensor | None = None
) -> Iterator[AttentionTile]:
    """Probabilities of the latest queries of a row over its keys; every query over itself and what is before it.

    Args:
        query: ``(B, H, n, D)`` of the last n keys' tokens.
        key: ``(B, H_kv, T, D)``, T at least n.
        lse: ``(B, H, n)`` over all that each query sees, be it here or elsewhere.
        scale: Factor on the scores.
        positions: ``(B, T)`` of the tokens in their row, ascending; -1 for padding, anywhere, whose queries, keys and
            log-sum-exp may be whatever, and which has weights of 0. None: from 0 on, without padding.

    Returns:
        Tiles with blocks of S keys: row by row, and within some rows key by key; together, every visible pair once.

    Raises:
        ValueError: With the first tile: head counts do not fit, or queries are more than keys.
    """
    _check_dense(query, key)
    (batch, heads, num_queries, _), (kv_heads, num_keys) = query.shape, key.shape[1:3]
    if not query.numel():
        return
    tile = tile_size(key.device)
    step = max(1, tile // (heads * num_queries * _RUN))  # rows
    for begin in range(0, batch, step):
        rows = slice(begin, begin + step)
        block = _DenseRows.of(query[rows], key[rows], lse[rows], scale, None if positions is None else positions[rows])
        owner = torch.arange(begin * kv_heads, begin * kv_heads + len(block.positions), device=key.device)
        for keys, queries in _dense_cuts(num_queries, num_keys, query.shape[3], tile // len(block.query)):
            weights = block.weights(keys, queries)
            places_of = slice(queries.start + num_keys - num_queries, queries.stop + num_keys - num_queries)
            yield AttentionTile(
                weights,
                block.positions[:, places_of],
                block.key_positions[:, keys],
                owner,
                queries,
                (rows, slice(None), keys),
            )


class _DenseRows(NamedTuple):
    """Some rows; R key-value heads in all.

    Attributes:
        query: ``(R * G, n, D + 2)``, folded.
        key: ``(B', H_kv, T, D)``.
        padding: ``(B', 1, T)``; None: there is none.
        positions: ``(R, T)``, -1 for padding.
        key_positions: ``(R, T)``, ``NEVER`` for padding.
    """

    query: Tensor
    key: Tensor
    padding: Tensor | None
    positions: Tensor
    key_positions: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, lse: Tensor, scale: float, positions: Tensor | None) -> "_DenseRows":
        """From arguments as ``dense_tiles`` takes them."""
        if positions is None:
            counted = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
            counted = counted.expand(key.shape[0] * key.shape[1], -1)
            return cls(_fold_queries(query, lse, scale).flatten(0, 1), key, None, counted, counted)
        padding, by_head = (positions < 0)[:, None], positions.int().repeat_interleave(key.shape[1], 0)
        folded = _fold_queries(query, lse, scale, padding[..., -query.shape[2] :])
        return cls(folded.flatten(0, 1), key, padding, by_head, by_head.masked_fill(by_head < 0, NEVER))

    def weights(self, keys: slice, queries: slice) -> Tensor:
        """Probabilities ``(R, G, c, S)``."""
        heads, num_queries = len(self.positions), self.query.shape[1]
        groups = len(self.query) // heads
        hidden = None if self.padding is None else self.padding[..., keys]
        key = _fold_keys(self.key[:, :, keys], self.query.dtype, hidden).flatten(0, 1)
        if groups > 1:
            key = key.repeat_interleave(groups, 0)
        with autocast_off(key):
            weights = torch.bmm(self.query[:, queries], key.mT)
        weights.exp_()
        first = queries.start + self.key.shape[2] - num_queries - keys.start  # its place beside the run's first key
        crossed = keys.stop - keys.start - 1 - first  # queries that do not see all of the run
        if crossed > 0:
            weights[:, :crossed].tril_(first)
        return weights.view(heads, groups, *weights.shape[1:])


def _check_dense(query: Tensor, key: Tensor) -> None:
    check_groups(query.shape[1], key.shape[1])
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries cannot be the last of {key.shape[2]} tokens; pass all their keys")


def _fold_queries(query: Tensor, lse: Tensor, scale: float, padding: Tensor | None = None) -> Tensor:
    """``[q * scale, -lse, 1]``, whose product with a folded key is what a probability is the exponential of.

    Args:
        query: ``(B', H, n, D)``.
        lse: ``(B', H, n)``.
        scale: Factor on the scores.
        padding: ``(B', 1, n)`` queries that see nothing.
    """
    dim, wide = query.shape[-1], wide_dtype(query.dtype)
    folded = query.new_empty(*query.shape[:-1], dim + 2, dtype=wide)
    folded[..., :dim].copy_(query).mul_(scale)
    folded[..., dim], folded[..., dim + 1] = -lse.to(wide), 1.0
    if padding is not None:
        folded[..., :dim].masked_fill_(padding.unsqueeze(-1), 0.0)  # neither NaN nor anything else beside an infinity
        folded[..., dim].masked_fill_(padding, -torch.inf)
    return folded


def _fold_keys(key: Tensor, dtype: torch.dtype, padding: Tensor | None) -> Tensor:
    """``[k, 1, 0]`` of keys ``(B', H_kv, S, D)``, and ``[0, 1, -inf]`` where they are ``padding (B', 1, S)``."""
    dim = key.shape[-1]
    folded = key.new_empty(*key.shape[:-1], dim + 2, dtype=dtype)
    folded[..., :dim], folded[..., dim], folded[..., dim + 1] = key, 1.0, 0.0
    if padding is not None:
        folded[..., :dim].masked_fill_(padding.unsqueeze(-1), 0.0)
        folded[..., dim + 1].masked_fill_(padding, -torch.inf)
    return folded


def _dense_cuts(num_queries: int, num_keys: int, dim: int, pairs: int) -> Iterator[tuple[slice, slice]]:
    """Keys and queries of each tile of so many pairs of a head, or of one query and a run."""
    before = num_keys - num_queries  # keys that all queries see: no diagonal keeps their runs short
    chunk = min(num_queries, max(1, pairs // _RUN))
    width = max(_RUN, pairs // max(chunk, dim))  # its keys are copied, too
    starts = [*range(0, before, width), *range(before, num_keys, _RUN)]
    for start, stop in zip(starts, [*starts[1:], num_keys], strict=True):
        for first in range(max(0, start - before), num_queries, chunk):
            yield slice(start, stop), slice(first, min(first + chunk, num_queries))


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    query_weights: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """What the latest queries of a row give to each of its keys, all of them and all G heads together.

    Args:
        query: ``(B, H, n, D)`` of the last n keys' tokens: of all in H2O, of a window in SnapKV.
        key: ``(B, H_kv, T, D)``, T at least n.
        lse: ``(B, H, n)`` over all that each query sees, be it here or elsewhere.
        scale: Factor on the scores.
        query_weights: ``(B, H, n)`` or ``(B, n)`` factors on the queries, finite; 1 by default.
        positions: See ``dense_tiles``.

    Returns:
        ``(B, H_kv, T)`` in at least float32; 0 for padding.

    Raises:
        ValueError: See ``dense_tiles``.
    """
    if query_weights is not None and query_weights.dim() == 2:
        query_weights = query_weights[:, None].expand(query.shape[:3])
    sums = torch.zeros(key.shape[:3], dtype=wide_dtype(query.dtype), device=key.device)
    for tile in dense_tiles(query, key, lse, scale, positions=positions):
        tile.add(sums, tile.column_sums(query_weights))
    return sums


@torch.no_grad()
def last_rows(query: Tensor, key: Tensor, lse: Tensor, scale: float, *, positions: Tensor | None = None) -> Tensor:
    """Probabilities of the latest queries of a row over all its keys, one by one: for few queries.

    Args:
        query: ``(B, H, w, D)`` of the last w keys' tokens.
        key: ``(B, H_kv, T, D)``, T at least w.
        lse: ``(B, H, w)`` over all that each query sees.
        scale: Factor on the scores.
        positions: See ``dense_tiles``.

    Returns:
        ``(B, H, w, T)`` in at least float32; 0 where a query does not see a key.

    Raises:
        ValueError: See ``dense_tiles``.
    """
    _check_dense(query, key)
    wide, (batch, heads, num_queries, dim), (kv_heads, num_keys) = wide_dtype(query.dtype), query.shape, key.shape[1:3]
    if not query.numel():
        return query.new_zeros(batch, heads, num_queries, num_keys, dtype=wide)
    by_head = (batch * kv_heads, heads // kv_heads * num_queries, -1)  # no copies of keys, which are more than queries
    with autocast_off(query):
        scores = torch.baddbmm(
            -lse.to(wide).reshape(by_head),
            (query.to(wide) * scale).reshape(by_head),
            key.to(wide).reshape(batch * kv_heads, num_keys, dim).mT,
        )
    rows = scores.view(batch, heads, num_queries, num_keys)
    if positions is not None:
        padding = (positions < 0)[:, None, None]
        rows.masked_fill_(padding | padding[..., -num_queries:].mT, -torch.inf)
    return rows.exp_().tril_(num_keys - num_queries)
