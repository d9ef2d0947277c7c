"""Probabilities that come again from the log-sum-exp, against an eager softmax over all pairs."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtrain.kernels import attention_scores, paged_scores
from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_scores import AttentionTile, column_sums, dense_tiles, last_rows
from kvtrain.kernels.page_layout import PageLayout
from kvtrain.kernels.paged_scores import paged_tiles
from tests.kernels.tensor_sizes import TensorSizes
from tests.kernels.test_paged_attention import Pages, make_pages

PROPERTY = settings(max_examples=60)
NAN, INF = float("nan"), float("inf")
SCALE = 0.4


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """So small that every call of a test takes several of each kind."""
    monkeypatch.setattr(attention_scores, "TILE", 300)
    monkeypatch.setattr(attention_scores, "_RUN", 5)
    monkeypatch.setattr(paged_scores, "_SCRATCH_BYTES", 500)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eager(query: Tensor, key: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``(B, H, n, T)`` and log-sum-exp, of pairs that are ``visible (B, H_kv or 1, n, T)``."""
    groups = query.shape[1] // key.shape[1]
    visible = visible.expand(-1, key.shape[1], -1, -1).repeat_interleave(groups, 1)
    scores = (query @ key.repeat_interleave(groups, 1).mT * SCALE).masked_fill(~visible, -INF)
    return scores.softmax(-1).nan_to_num(0.0), scores.logsumexp(-1)


def by_key_head(rows: Tensor, kv_heads: int) -> Tensor:
    """Sums ``(B, H_kv, T)`` of rows ``(B, H, n, T)``."""
    return rows.unflatten(1, (kv_heads, -1)).sum((2, 3))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


@dataclass
class Dense:
    """The latest queries of a row and all keys; whatever belongs to padding is 0 here, and NaN in ``arguments``.

    Attributes:
        query: ``(B, H, n, D)``.
        key: ``(B, H_kv, T, D)``.
        real: ``(B, T)``.
        rows: Probabilities ``(B, H, n, T)``.
        lse: ``(B, H, n)``.
    """

    query: Tensor
    key: Tensor
    real: Tensor
    rows: Tensor
    lse: Tensor

    @property
    def positions(self) -> Tensor:
        return (self.real.cumsum(1) - 1).masked_fill(~self.real, -1)

    def arguments(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        padding = ~self.real[:, None]
        queries = padding[:, :, -self.query.shape[2] :]
        return {
            "query": self.query.masked_fill(queries.unsqueeze(-1), NAN).to(dtype),
            "key": self.key.masked_fill(padding.unsqueeze(-1), NAN).to(dtype),
            "lse": self.lse.masked_fill(queries, NAN).to(torch.promote_types(dtype, torch.float32)),
            "scale": SCALE,
            "positions": self.positions,
        }


def make_dense(
    length: int,
    num_queries: int,
    *,
    batch: int = 2,
    groups: int = 2,
    kv_heads: int = 2,
    padded: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Dense:
    """Tensors that ``dtype`` can hold; padding anywhere."""
    query = random(batch, groups * kv_heads, num_queries, 4, seed=seed).to(dtype).double()
    key = random(batch, kv_heads, length, 4, seed=seed + 1).to(dtype).double()
    real = random(batch, length, seed=seed + 2) > (-0.5 if padded else -INF)
    visible = torch.ones(num_queries, length, dtype=torch.bool).tril(length - num_queries)
    visible = visible & real[:, None, None] & real[:, None, -num_queries:, None]
    return Dense(query, key, real, *eager(query, key, visible))


@st.composite
def dense(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Dense:
    length = draw(st.integers(1, 40))
    return make_dense(
        length,
        draw(st.integers(1, length)),
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        padded=draw(st.booleans()),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )


@PROPERTY
@given(dense(), st.booleans())
def test_dense_keys(case: Dense, by_row: bool):
    """Sums and rows, MHA to MQA, all queries or the last ones, NaN in padding; factors on queries, by head or not."""
    kv_heads, arguments = case.key.shape[1], case.arguments()
    assert_close(column_sums(**arguments), by_key_head(case.rows, kv_heads))
    assert_close(last_rows(**arguments), case.rows)
    factors = random(*case.rows.shape[:3:2], seed=5) if by_row else random(*case.rows.shape[:3], seed=5)
    weighted = case.rows * (factors[:, None] if by_row else factors).unsqueeze(-1)
    assert_close(column_sums(**arguments, query_weights=factors), by_key_head(weighted, kv_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_dense_keys_in_fewer_bits(dtype: torch.dtype, padded: bool):
    """Products are computed in float32, which autocast does not change."""
    case = make_dense(150, 140, padded=padded, dtype=dtype)
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sums, rows = column_sums(**case.arguments(dtype)), last_rows(**case.arguments(dtype))
        assert sums.dtype == rows.dtype == torch.float32
        assert_close(sums, by_key_head(case.rows, 2), 1e-5)
        assert_close(rows, case.rows, 1e-5)


def test_attention_has_said_the_log_sum_exp():
    """And the gradient of the values, where that of the output is a weight in every channel, is the same sums."""
    query, key = random(2, 4, 70, 4, seed=0), random(2, 2, 70, 4, seed=1)
    value, factors = random(2, 2, 70, 4, seed=2).requires_grad_(), random(2, 4, 70, seed=3)
    output, lse = attention(query, key, value, scale=SCALE)
    sums = column_sums(query, key, lse, SCALE, query_weights=factors)
    (grad,) = torch.autograd.grad(output, value, factors.unsqueeze(-1).expand_as(output))
    assert_close(grad, sums.unsqueeze(-1).expand_as(grad))
    latest = column_sums(query[:, :, -9:], key, lse[:, :, -9:], SCALE)
    assert_close(latest, by_key_head(last_rows(query, key, lse, SCALE)[:, :, -9:], 2))


@PROPERTY
@given(dense())
def test_dense_tiles(case: Dense):
    """What a tile says of itself: owner, queries, positions, who sees whom and where that is."""
    kv_heads, num_queries = case.key.shape[1], case.query.shape[2]
    shape = (case.key.shape[0], kv_heads, case.query.shape[1] // kv_heads, num_queries, case.key.shape[2])
    expected, seen = case.rows.view(shape).flatten(0, 1), torch.zeros(shape[:2] + shape[3:], dtype=torch.long)
    index = torch.arange(case.key.shape[2]).expand(case.key.shape[:3])
    for tile in dense_tiles(**case.arguments()):
        slots = tile.read(index)  # (N, S)
        keys = slice(int(slots[0, 0]), int(slots[0, -1]) + 1)
        assert_close(tile.weights, expected[tile.owner][:, :, tile.queries, keys])
        rows = tile.owner // kv_heads
        assert torch.equal(tile.positions, case.positions[:, -num_queries:][rows][:, tile.queries].int())
        assert torch.equal(tile.live, case.real[rows][:, keys])
        assert torch.equal(tile.visible, tile.weights[:, 0] > 0)
        seen.flatten(0, 1)[tile.owner, tile.queries, keys] += 1
    assert seen.max() <= 1 and torch.equal(seen > 0, seen.bool() | (case.rows.view(shape)[:, :, 0] > 0))


def poisoned(case: Pages) -> Pages:
    """NaN instead of what is garbage there."""
    case.keys = case.keys.masked_fill(case.keys == 1e6, NAN)
    return case


@dataclass
class Paged:
    """Queries over pages, and what they see.

    Attributes:
        pages: As attention over pages is tested with; NaN where nobody reads.
        positions: ``(B, n)`` of the queries; -1 for padding.
        key_positions: ``(pages, page_size)``; 0, which all see, where nobody reads.
        causal: Whether these hide anything.
        rows: Probabilities ``(B, H, n, T)``; T slots of a head.
        lse: ``(B, H, n)``.
    """

    pages: Pages
    positions: Tensor
    key_positions: Tensor
    causal: bool
    rows: Tensor
    lse: Tensor

    def tiles(self, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        pages = self.pages
        query = pages.query.masked_fill((self.positions < 0)[:, None, :, None], NAN).to(dtype)
        bits = None if pages.codec is None else pages.codec.bits
        keys = pages.keys if bits else pages.keys.to(dtype)
        lse = self.lse.to(torch.promote_types(dtype, torch.float32))
        options = {"key_positions": self.key_positions if self.causal else None, "bits": bits} | options
        return paged_tiles(query, keys, lse, SCALE, pages.table, pages.lengths, self.positions, **options)

    def by_slot(self, field: Tensor) -> Tensor:
        """Of a field ``(pages, page_size)`` what the heads own, ``(B, H_kv, T)``; 0 elsewhere."""
        slots = field[self.pages.table.clamp(min=0).long()].flatten(2)
        filled = torch.arange(slots.shape[2]) < self.pages.lengths.unsqueeze(-1)
        return slots.masked_fill(~filled, 0)


def make_paged(pages: Pages, *, causal: bool = True, seed: int = 0) -> Paged:
    """Slots hold tokens in any order, as after an eviction; a query's position is any, or it is padding."""
    batch, num_queries, slots = len(pages.query), pages.query.shape[2], pages.key.shape[2]
    positions = torch.randint(-1, 60, (batch, num_queries), generator=torch.Generator().manual_seed(seed))
    dense = random(*pages.lengths.shape, 60, seed=seed).argsort(-1)[..., :slots]
    filled = torch.arange(slots) < pages.lengths.unsqueeze(-1)
    size = pages.keys.shape[1]
    key_positions = torch.zeros(pages.keys.shape[:2], dtype=torch.int32)
    owned = pages.table >= 0
    key_positions[pages.table[owned].long()] = dense.unflatten(2, (-1, size))[owned].int()
    visible = filled.unsqueeze(2) & (positions >= 0)[:, None, :, None]
    if causal:
        visible = visible & (dense.unsqueeze(2) <= positions[:, None, :, None])
    key = pages.key.masked_fill(~filled.unsqueeze(-1), 0.0)
    return Paged(pages, positions, key_positions, causal, *eager(pages.query, key, visible))


@st.composite
def paged(draw: st.DrawFn) -> Paged:
    rows, heads, bits = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([None, None, 8, 4]))
    counts = st.lists(st.integers(0, 40), min_size=heads, max_size=heads)
    pages = make_pages(
        draw(st.lists(counts, min_size=rows, max_size=rows)),
        page_size=draw(st.integers(1, 16)),
        groups=draw(st.integers(1, 3)),
        num_queries=draw(st.sampled_from([1, 1, 2, 9])),
        free=draw(st.integers(0, 20)),  # many: pages are copied
        seed=draw(st.integers(0, 9)),
    )
    pages = poisoned(pages) if bits is None else poisoned(pages).quantized(bits)
    return make_paged(pages, causal=draw(st.booleans()), seed=draw(st.integers(0, 9)))


def sums_of(case: Paged, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    field = torch.zeros(case.key_positions.shape, dtype=torch.promote_types(dtype, torch.float32))
    for tile in case.tiles(dtype, **options):
        tile.add(field, tile.column_sums())
    assert field.isfinite().all()
    return case.by_slot(field)


@PROPERTY
@given(paged(), st.booleans())
def test_pages(case: Paged, own_layout: bool):
    """Ragged and empty heads, few and many queries, packed keys; NaN in free pages, unused slots and padding."""
    table, kv_heads = case.pages.table.flatten(0, 1), case.pages.key.shape[1]
    layout = PageLayout(table, len(case.pages.keys), case.pages.keys.shape[1]) if own_layout else None
    assert_close(sums_of(case, layout=layout), by_key_head(case.rows, kv_heads))


@pytest.mark.parametrize("num_queries", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_in_fewer_bits(dtype: torch.dtype, num_queries: int):
    pages = poisoned(make_pages([[50, 7], [0, 33]], page_size=8, num_queries=num_queries))
    pages.query, pages.key, pages.keys = (part.to(dtype).double() for part in (pages.query, pages.key, pages.keys))
    case = make_paged(pages)
    with torch.autocast("cpu", torch.bfloat16):
        sums = sums_of(case, dtype)
    assert_close(sums, by_key_head(case.rows, 2), 1e-5)


@PROPERTY
@given(paged())
def test_tiles_of_pages(case: Paged):
    """What a tile says of itself; ``by_slot`` says where."""
    kv_heads, size = case.pages.key.shape[1], case.pages.keys.shape[1]
    batch, heads, num_queries, slots = case.rows.shape
    expected = case.rows.view(batch * kv_heads, heads // kv_heads, num_queries, slots)
    numbers = torch.full(case.key_positions.shape, -1)  # slot of its head that each slot of the pool is
    owned = case.pages.table >= 0
    numbers[case.pages.table[owned].long()] = torch.arange(slots).view(-1, size).expand(*owned.shape, size)[owned]
    seen = torch.zeros(batch * kv_heads, num_queries, slots, dtype=torch.long)
    for tile in case.tiles():
        block, slot = tile.live.nonzero(as_tuple=True)
        number, head = tile.read(numbers)[block, slot], tile.owner[block]
        weights, visible = tile.weights[block, :, :, slot], tile.visible[block, :, slot]
        assert_close(weights, expected[head, :, tile.queries, number])
        assert torch.equal(visible, weights[:, 0] > 0)
        assert torch.equal(tile.positions, case.positions[tile.owner // kv_heads][:, tile.queries].int())
        assert not tile.weights.sum((1, 2))[~tile.live].any() and not (tile.visible & ~tile.live.unsqueeze(1)).any()
        for query in range(*tile.queries.indices(num_queries)):
            seen[head, query, number] += 1
    filled = torch.arange(slots) < case.pages.lengths.flatten()[:, None]
    assert torch.equal(seen, filled.long().unsqueeze(1).expand_as(seen))


def policy(tile: AttentionTile, sums: Tensor, latest: Tensor, hits: Tensor) -> None:
    """What policies do with a tile: add up, keep the last query's, keep the position of the last one that looked."""
    tile.add(sums, tile.column_sums())
    last = tile.positions[:, -1:] == 39
    tile.put(latest, tile.weights[:, :, -1].sum(1), last)
    looked = torch.where(tile.weights.amax(1) > 0.05, tile.positions.unsqueeze(2), -1).amax(1)
    tile.maximum(hits, looked)


@pytest.mark.parametrize("free", [0, 30])  # pages in place, and copied
def test_fields_are_the_same_over_pages_and_over_dense_keys(free: int):
    """A prompt of 40 tokens whose keys are on pages, too; fields of an integer and of a half type."""
    case = make_dense(40, 40, groups=2, padded=False)
    pages = make_pages([[40, 40], [40, 40]], page_size=4, num_queries=40, free=free)
    owned = pages.table.long()
    pages.keys[owned] = case.key.unflatten(2, (-1, 4))
    key_positions = torch.zeros(pages.keys.shape[:2], dtype=torch.long)
    key_positions[owned] = torch.arange(40).view(-1, 4)
    kinds = (torch.float64, torch.bfloat16, torch.int32)
    dense = [torch.full((2, 2, 40), -2, dtype=kind) for kind in kinds]
    paged = [torch.full(key_positions.shape, -2, dtype=kind) for kind in kinds]
    for tile in dense_tiles(case.query, case.key, case.lse, SCALE):
        policy(tile, *dense)
    positions = torch.arange(40).expand(2, -1)
    for tile in paged_tiles(
        case.query, pages.keys, case.lse, SCALE, pages.table, pages.lengths, positions, key_positions=key_positions
    ):
        policy(tile, *paged)
    for at_slots, at_keys in zip(paged, dense, strict=True):
        assert_close(at_slots[owned].flatten(2), at_keys)
    free_pages = torch.ones(len(pages.keys), dtype=torch.bool).index_fill_(0, owned.flatten(), 0)
    assert all(field[free_pages].eq(-2).all() for field in paged)
    assert_close(dense[0], by_key_head(case.rows, 2) - 2)
    assert_close(dense[1], case.rows[:, :, -1].unflatten(1, (2, -1)).sum(2).bfloat16())
    hits = torch.where(case.rows > 0.05, torch.arange(40)[:, None], -1).amax(2).unflatten(1, (2, -1)).amax(2)
    assert torch.equal(dense[2], hits.int())


@pytest.mark.parametrize("free", [0, 30])
def test_what_other_rows_own_stays_as_it_is(free: int):
    pages = make_pages([[9, 6], [5, 8]], page_size=4, free=free)
    positions, first = torch.full((1, 1), 9), pages.table[:1]
    field = torch.full(pages.keys.shape[:2], 7.0, dtype=torch.float64)
    query, lse = pages.query[:1], torch.zeros(1, 4, 1, dtype=torch.float64)
    for tile in paged_tiles(query, pages.keys, lse, SCALE, first, pages.lengths[:1], positions):
        tile.maximum(field, torch.full(tile.live.shape, 8.0))
        tile.put(field, tile.read(field) + 1)
        tile.add(field, tile.column_sums() * 0)
    assert field.eq(9).sum() == 9 + 6 and field.eq(7).sum() == field.numel() - 9 - 6


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """By a tile, and by queries and keys: nothing has the size of all pairs."""
    monkeypatch.setattr(attention_scores, "TILE", 3000)
    case = make_dense(400, 400, batch=1)
    with TensorSizes() as sizes:
        column_sums(**case.arguments())
    assert max(sizes) <= max(3000, 4 * 400 * (4 + 2))  # queries get channels
    latest = make_dense(4000, 20, batch=1, padded=False)
    with TensorSizes() as sizes:
        column_sums(latest.query, latest.key, latest.lse, SCALE)
    assert max(sizes) <= latest.key.numel()  # what looks at a part of them
    paged = make_paged(make_pages([[40, 50], [30, 60]], page_size=4, num_queries=100))
    with TensorSizes() as sizes:
        sums_of(paged)
    assert max(sizes) <= max(3000, paged.pages.query.numel())


def test_there_is_no_gradient():
    """And whoever takes the tiles keeps the mode that it is in."""
    case = make_dense(9, 9, padded=False)
    query = case.query.requires_grad_()
    assert not column_sums(query, case.key, case.lse, SCALE).requires_grad
    assert not last_rows(query, case.key, case.lse, SCALE).requires_grad
    for tile in dense_tiles(query, case.key, case.lse, SCALE):
        assert torch.is_grad_enabled() and not tile.weights.requires_grad


@pytest.mark.parametrize(("queries", "keys"), [((0, 4, 3), (0, 2, 5)), ((2, 4, 0), (2, 2, 5)), ((2, 4, 0), (2, 2, 0))])
def test_nothing_to_look_at(queries: tuple[int, int, int], keys: tuple[int, int, int]):
    query, key, lse = torch.ones(*queries, 4), torch.ones(*keys, 4), torch.zeros(queries)
    sums, rows = column_sums(query, key, lse, SCALE), last_rows(query, key, lse, SCALE)
    assert sums.shape == keys and sums.eq(0).all() and rows.shape == (*queries, keys[2])
    table, lengths = torch.full((queries[0], 2, 0), -1), torch.zeros(queries[0], 2, dtype=torch.long)
    positions = torch.zeros(queries[0], queries[2], dtype=torch.long)
    assert not list(paged_tiles(query, torch.ones(3, 4, 4), lse, SCALE, table, lengths, positions))


def test_what_does_not_fit_is_refused():
    query, key, lse = torch.ones(1, 3, 5, 4), torch.ones(1, 2, 5, 4), torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        column_sums(query, key, lse, SCALE)
    with pytest.raises(ValueError, match="5 queries cannot be the last of 4 tokens; pass all their keys"):
        last_rows(query, key[:, :1, :4], lse, SCALE)
    pages = make_pages([[9, 6]], page_size=4, groups=1)
    arguments = (pages.keys, torch.zeros(1, 3, 1), SCALE, pages.table, pages.lengths, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        next(paged_tiles(torch.ones(1, 3, 1, 4), *arguments))
