"""Attention over pages against attention over a dense copy of them."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.page_codec import RoundedVectors
from kvtrain.kernels.page_layout import PageLayout
from kvtrain.kernels.page_runs import PageRuns
from kvtrain.kernels.paged_attention import _Pages, paged_attention
from kvtrain.kernels.quantization import dequantize, packed_width, quantize

from .tensor_sizes import TensorSizes

PROPERTY = settings(max_examples=120)
BACKENDS = ["auto", "flash_cpu", "chunked"]  # auto: products, where queries are few
GARBAGE = 1e6  # in free pages and unused slots


@dataclass
class Pages:
    """Keys and values of ragged length, dense and on shuffled pages.

    Attributes:
        query: ``(B, G * H_kv, n, D)``.
        key: Dense, ``(B, H_kv, T, D)``; garbage where a head has no slot.
        value: ``(B, H_kv, T, D_v)``.
        lengths: ``(B, H_kv)``.
        keys: ``(pages, page_size, D)``.
        values: ``(pages, page_size, D_v)``.
        table: ``(B, H_kv, P)``.
        codec: Of packed ``keys`` and ``values``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    codec: RoundedVectors | None = None

    def run(self, backend: str = "auto", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        tensors = (self.query, self.keys, self.values)
        query, keys, values = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
        return paged_attention(query, keys, values, self.table, self.lengths, 0.4, codec=self.codec, backend=backend)

    def quantized(self, bits: int, group: int | None = None) -> "Pages":
        """The same on packed pages; what is dense has been packed once."""

        def packed_once(states: Tensor) -> Tensor:
            return dequantize(quantize(states, bits, group), bits, states.shape[-1], states.dtype, group)

        keys, values = quantize(self.keys, bits, group), quantize(self.values, bits, group)
        key, value = packed_once(self.key), packed_once(self.value)
        return replace(self, key=key, value=value, keys=keys, values=values, codec=RoundedVectors(bits, group))

    def dense(self) -> tuple[Tensor, Tensor]:
        absent = torch.arange(self.key.shape[2]) >= self.lengths.unsqueeze(-1)
        bias = torch.zeros(absent.shape, dtype=self.query.dtype).masked_fill(absent, float("-inf"))
        options = {"key_bias": bias, "causal": False, "scale": 0.4, "backend": "reference"}
        return attention(self.query, self.key, self.value, **options)


def make_pages(
    lengths: list[list[int]],
    *,
    page_size: int,
    groups: int = 2,
    num_queries: int = 1,
    dim: int = 4,
    value_dim: int | None = None,
    free: int = 2,
    seed: int = 0,
) -> Pages:
    """Random float64; ``free`` pages have no owner."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    counts = torch.tensor(lengths)
    needed = -(-counts // page_size)
    columns = int(needed.max())
    owned = torch.arange(columns) < needed.unsqueeze(-1)
    table = torch.full(owned.shape, -1, dtype=torch.int)
    table[owned] = torch.randperm(int(owned.sum()) + free, generator=random)[: int(owned.sum())].int()
    present = (torch.arange(columns * page_size) < counts.unsqueeze(-1)).unsqueeze(-1)
    dense, paged = [], []
    for channels in (dim, value_dim or dim):
        dense.append(torch.where(present, normal(*counts.shape, columns * page_size, channels), GARBAGE))
        paged.append(torch.full((int(owned.sum()) + free, page_size, channels), GARBAGE, dtype=torch.float64))
        paged[-1][table[owned]] = dense[-1].unflatten(2, (columns, page_size))[owned]
    query = normal(counts.shape[0], groups * counts.shape[1], num_queries, dim)
    return Pages(query, *dense, counts, *paged, table)


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


@st.composite
def pages(draw: st.DrawFn) -> Pages:
    rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, 40), min_size=heads, max_size=heads)
    return make_pages(
        draw(st.lists(counts, min_size=rows, max_size=rows)),
        page_size=draw(st.integers(1, 16)),
        groups=draw(st.integers(1, 3)),
        num_queries=draw(st.integers(1, 9)),
        free=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 9)),
    )


@PROPERTY
@given(pages(), st.sampled_from(BACKENDS))
def test_it_is_attention_over_what_the_pages_hold(case: Pages, backend: str):
    """Ragged and empty heads; few queries (every page in place) and many (runs of pages); garbage elsewhere."""
    assert_close(case.run(backend), case.dense(), 1e-12)


@PROPERTY
@given(pages(), st.sampled_from(BACKENDS))
def test_float32(case: Pages, backend: str):
    output, lse = case.run(backend, torch.float32)
    assert output.dtype == lse.dtype == torch.float32
    assert_close((output, lse), case.dense(), 1e-5)


LONG = [[2300, 1023], [0, 1025], [2048, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("page_size", "num_queries"), [(16, 1), (16, 40), (48, 40), (1100, 1), (1100, 560)])
def test_more_slots_than_one_run_copies(backend: str, page_size: int, num_queries: int):
    """1024 slots of a head, or one page, are copied at a time; heads that end earlier are left out."""
    case = make_pages(LONG, page_size=page_size, num_queries=num_queries)
    assert_close(case.run(backend), case.dense(), 1e-12)
    assert_close(case.run(backend, torch.float32), case.dense(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_queries", [1, 40])
def test_bf16_stays_near_the_exact_result(backend: str, num_queries: int):
    """Also over ten runs: what is merged is not rounded on the way."""
    case = make_pages([[10000, 40], [3, 0]], page_size=32, num_queries=num_queries, dim=16)
    case.query, case.key, case.value, case.keys, case.values = (
        tensor.bfloat16().double() for tensor in (case.query, case.key, case.value, case.keys, case.values)
    )
    output, lse = case.run(backend, torch.bfloat16)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = case.dense()
    assert_close((output, lse), expected, 2e-2)
    long, exact = output[0, :2].double(), expected[0][0, :2]
    assert (long - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("free", [0, 2])
def test_where_nothing_is_visible(backend: str, num_queries: int, free: int):
    """Zeros and ``-inf``: heads without pages, pages without slots, tables without columns, pools without pages."""
    case = make_pages([[0, 5], [0, 0]], page_size=4, num_queries=num_queries, free=free)
    hidden = make_pages([[3, 5], [1, 4]], page_size=4, num_queries=num_queries, free=free)
    hidden.lengths = torch.zeros_like(hidden.lengths)
    empty = make_pages([[0, 0], [0, 0]], page_size=4, num_queries=num_queries, free=free)
    assert empty.table.shape[2] == 0 and empty.keys.shape[0] == free
    for output, lse in (
        [part[:, :2] for part in case.run(backend)],
        [part[1] for part in case.run(backend)],
        hidden.run(backend),
        empty.run(backend),
    ):
        assert output.eq(0).all() and lse.eq(float("-inf")).all()


@PROPERTY
@given(pages(), st.data(), st.sampled_from(BACKENDS))
def test_a_prefix_of_each_head_and_the_rest_make_the_whole(case: Pages, data: st.DataObject, backend: str):
    """``lengths`` may be fewer than there are slots; disjoint parts merge by their log-sum-exp."""
    whole = case.dense()
    total = case.lengths
    cuts = [data.draw(st.integers(0, length)) for length in total.flatten().tolist()]
    case.lengths = torch.tensor(cuts).view_as(total)
    first = case.run(backend)
    assert_close(first, case.dense(), 1e-12)
    index = torch.arange(case.key.shape[2])
    rest = (index >= case.lengths.unsqueeze(-1)) & (index < total.unsqueeze(-1))
    bias = torch.zeros(rest.shape, dtype=torch.float64).masked_fill(~rest, float("-inf"))
    second = attention(case.query, case.key, case.value, key_bias=bias, causal=False, scale=0.4)
    assert_close(merge_attention([first, second]), whole, 1e-12)


@pytest.mark.parametrize("num_queries", [1, 9])
def test_values_of_another_width(num_queries: int):
    case = make_pages([[9, 0], [4, 30]], page_size=4, num_queries=num_queries, value_dim=3)
    assert_close(case.run(), case.dense(), 1e-12)
    with pytest.raises(ValueError, match="paged attention: backend 'flash_cpu' cannot run this call"):
        case.run("flash_cpu")


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("num_queries", [2, 9])
def test_queries_receive_gradients(backend: str, num_queries: int):
    """Also past empty heads and free pages, and after the pages were written again."""
    case = make_pages([[9, 0], [4, 30]], page_size=4, num_queries=num_queries)
    weight, gradients = torch.randn(case.query.shape, dtype=torch.float64), []
    case.query.requires_grad_()
    for run in (lambda: case.run(backend), case.dense):
        output, lse = run()
        loss = (output * weight).sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()
        pages, case.keys, case.values = (case.keys, case.values), case.keys.clone(), case.values.clone()
        for tensor in pages:
            tensor.add_(1.0)
        gradients += torch.autograd.grad(loss, case.query)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match="'flash_cpu' cannot run this call"):  # its log-sum-exp has no derivative
        case.run("flash_cpu")


@pytest.mark.parametrize("num_queries", [1, 40])
def test_no_dense_copy_is_made(num_queries: int):
    """One long head among eight: the pages as they lie, or 1024 slots a head, are the largest tensors."""
    case = make_pages([[10000, 5, 5, 5], [5] * 4], page_size=16, groups=1, num_queries=num_queries, dim=64, free=0)
    with TensorSizes() as sizes:
        case.run(dtype=torch.float64)
    most = case.keys.numel() if num_queries == 1 else 8 * 1024 * 64
    assert max(sizes) <= most < case.key.numel() / 4


@pytest.mark.parametrize("backend", ["reference", "triton", ""])
@pytest.mark.parametrize("num_queries", [1, 9])
def test_unknown_backends_are_refused(backend: str, num_queries: int):
    case = make_pages([[9, 0]], page_size=4, num_queries=num_queries)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call; use 'auto' or one of .*flash_cpu"):
        case.run(backend)


@pytest.mark.parametrize(("page_size", "most"), [(2, 2), (4, 4), (8, 4)])
def test_products_serve_few_queries(page_size: int, most: int):
    """So many of a key-value head, and no more than a page has slots."""
    for num_queries in range(1, most + 1):
        case = make_pages([[9, 0], [4, 30]], page_size=page_size, groups=1, num_queries=num_queries, value_dim=3)
        assert_close(case.run("bmm"), case.dense(), 1e-12)
    case = make_pages([[9, 0], [4, 30]], page_size=page_size, groups=1, num_queries=most + 1)
    with pytest.raises(ValueError, match="'bmm' cannot run this call"):
        case.run("bmm")


@pytest.mark.parametrize("scratch", [1, 5 * 32 * 2 * 16 * 4, 2**22])
def test_pages_of_half_types_are_widened_in_parts(monkeypatch, scratch: int):
    """All give the same; more pages of the pool are free or others' than are read."""
    monkeypatch.setattr("kvtrain.kernels.paged_attention._SCRATCH_BYTES", scratch)
    for free in (0, 60):
        case = make_pages([[1000, 40], [3, 0]], page_size=32, dim=16, free=free)
        case.query, case.key, case.value, case.keys, case.values = (
            tensor.bfloat16().double() for tensor in (case.query, case.key, case.value, case.keys, case.values)
        )
        output, lse = case.run("bmm", torch.bfloat16)
        assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
        expected = case.dense()
        torch.testing.assert_close(output, expected[0].bfloat16(), atol=1e-3, rtol=8e-3)
        torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)


def test_a_layout_is_as_wide_as_the_longest_head():
    """Also where the table has room for longer ones, of other rows; results are the same."""
    case = make_pages([[9, 0], [4, 13]], page_size=4)
    wide = replace(case, table=torch.nn.functional.pad(case.table, (0, 60), value=-1))
    assert PageLayout(wide.table.flatten(0, 1), 20, 4).order.shape == (4, 4)
    for found, expected in zip(wide.run(), case.run(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kept", "reads"), [(0, 4), (1024, 3), (2048, 2)])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_runs_that_a_caller_keeps_are_copied_once(monkeypatch, kept: int, reads: int, num_queries: int):
    """As far as their bytes are allowed, and as far as the longest head reaches in a table made for longer ones."""
    case, calls, read = make_pages([[1500, 1200]], page_size=32, num_queries=num_queries), [], _Pages.read
    monkeypatch.setattr(_Pages, "read", lambda *given: calls.append(given) or read(*given))
    table = torch.nn.functional.pad(case.table, (0, 60), value=-1)
    runs = PageRuns(table.flatten(0, 1), case.lengths.flatten(), 32, kept * 2 * (4 + 4) * 8)
    for query in (case.query, case.query.flip(1)):
        found = paged_attention(query, case.keys, case.values, table, case.lengths, 0.4, runs=runs)
        assert_close(found, replace(case, query=query).dense(), 1e-12)
    assert len(calls) == reads


def test_no_queries_no_rows_and_heads_that_do_not_group():
    pages, scale = torch.zeros(2, 4, 8), 1.0
    table, lengths = torch.zeros(1, 2, 1, dtype=torch.int), torch.ones(1, 2, dtype=torch.long)
    output, lse = paged_attention(torch.zeros(1, 4, 0, 8), pages, pages, table, lengths, scale)
    assert output.shape == (1, 4, 0, 8) and lse.shape == (1, 4, 0)
    output, lse = paged_attention(torch.zeros(0, 4, 1, 8), pages, pages, table[:0], lengths[:0], scale)
    assert output.shape == (0, 4, 1, 8) and lse.shape == (0, 4, 1)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        paged_attention(torch.zeros(1, 3, 2, 8), pages, pages, table, lengths, scale)


BITS = [8, 4, 2]


@PROPERTY
@given(pages(), st.sampled_from(BITS), st.sampled_from([None, 1, 2]), st.sampled_from(BACKENDS))
def test_quantized_pages_are_attention_over_what_they_hold(case: Pages, bits: int, group: int | None, backend: str):
    """Ragged and empty heads, few queries and many, garbage elsewhere."""
    packed = case.quantized(bits, group)
    assert packed.keys.shape == (*case.keys.shape[:2], packed_width(4, bits, group))
    assert_close(packed.run(backend), packed.dense(), 1e-12)
    assert_close(packed.run(backend, torch.float32), packed.dense(), 1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("page_size", "num_queries"), [(16, 1), (48, 3), (48, 40), (1100, 1)])
def test_more_quantized_slots_than_one_run_or_the_scratch_holds(
    monkeypatch, bits: int, page_size: int, num_queries: int
):
    for scratch in (1, 2 * 1100 * 8 * 8, 2**22):
        monkeypatch.setattr("kvtrain.kernels.paged_attention._SCRATCH_BYTES", scratch)
        case = make_pages(LONG, page_size=page_size, num_queries=num_queries).quantized(bits)
        assert_close(case.run(), case.dense(), 1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_few_queries_dequantize_into_bounded_memory(bits: int):
    """Keys and values of 64 heads would take 128 MiB: never more than 8 runs, 4 MiB, are there at a time."""
    counts, dim = [[4096] * 8] * 8, 64
    case = make_pages([[1]], page_size=32, groups=1, dim=dim, free=0)  # queries, tables and lengths of a larger one
    owned = torch.arange(64 * 128, dtype=torch.int).view(8, 8, 128)
    packed = torch.zeros(owned.numel(), 32, packed_width(dim, bits), dtype=torch.uint8)
    codec, lengths = RoundedVectors(bits), torch.tensor(counts)
    case = replace(case, keys=packed, values=packed, table=owned, lengths=lengths, codec=codec)
    case.query = torch.zeros(8, 8, 1, dim)
    with TensorSizes() as sizes:
        case.run(dtype=torch.float32)
    assert max(sizes) <= 8 * 1024 * packed_width(dim, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("free", [0, 2])
def test_where_nothing_is_visible_on_quantized_pages(bits: int, num_queries: int, free: int):
    case = make_pages([[0, 5], [0, 0]], page_size=4, num_queries=num_queries, free=free).quantized(bits)
    hidden = replace(case, lengths=torch.zeros_like(case.lengths))
    empty = make_pages([[0, 0], [0, 0]], page_size=4, num_queries=num_queries, free=free).quantized(bits)
    for output, lse in ([part[1] for part in case.run()], hidden.run(), empty.run()):
        assert output.eq(0).all() and lse.eq(float("-inf")).all()
    none = replace(case, query=case.query[:, :, :0])
    assert none.run()[0].shape == (2, 4, 0, 4)


@pytest.mark.parametrize("num_queries", [2, 9])
def test_queries_of_quantized_pages_receive_gradients(num_queries: int):
    """Values of another width, and pages that were written again."""
    case = make_pages([[9, 0], [4, 30]], page_size=4, num_queries=num_queries, value_dim=6).quantized(4)
    weight, gradients = torch.randn(*case.query.shape[:3], 6, dtype=torch.float64), []
    case.query.requires_grad_()
    for run in (case.run, case.dense):
        output, lse = run()
        loss = (output * weight).sum() + lse.masked_fill(lse == float("-inf"), 0.0).sin().sum()
        case.keys.zero_()
        gradients += torch.autograd.grad(loss, case.query)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_bf16_queries_over_quantized_pages():
    case = make_pages([[5000, 40], [3, 0]], page_size=32, dim=16).quantized(8)
    case.query = case.query.bfloat16().double()
    output, lse = case.run(dtype=torch.bfloat16)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_close((output, lse), case.dense(), 2e-2)


@pytest.mark.parametrize("num_queries", [1, 9])
def test_pages_of_other_bits_are_refused(num_queries: int):
    case = make_pages([[9, 0]], page_size=4, num_queries=num_queries).quantized(8)
    with pytest.raises(ValueError, match="queries have 4 channels, and the keys on these pages 8 by this"):
        replace(case, codec=RoundedVectors(4)).run()
