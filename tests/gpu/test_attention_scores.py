"""Attention probabilities in tiles, over dense keys and over pages, on every device."""

import pytest
import torch

from kvtrain.kernels.attention_scores import column_sums, last_rows
from kvtrain.kernels.paged_scores import paged_tiles
from tests.kernels import test_attention_scores as scores
from tests.kernels.test_paged_attention import make_pages

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}  # of what the dtype can hold
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@DTYPES
@pytest.mark.parametrize("num_queries", [300, 40])
def test_dense_keys(num_queries: int, dtype: torch.dtype, device: str):
    """Padding among the tokens, with NaN in it; a factor on each query."""
    case = scores.make_dense(300, num_queries, dtype=dtype)
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.arguments(dtype).items()}
    factors = scores.random(2, num_queries, seed=9)
    sums = column_sums(**there, query_weights=factors.to(device))
    expected = scores.by_key_head(case.rows * factors[:, None, :, None], 2)
    assert (sums.cpu().double() - expected).norm() < TOLERANCES[dtype] * expected.norm()
    assert (last_rows(**there).cpu().double() - case.rows).norm() < TOLERANCES[dtype] * case.rows.norm()


@DTYPES
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_pages(bits: int | None, num_queries: int, dtype: torch.dtype, device: str):
    """Ragged heads, one of them empty, and free pages; the newest keys are hidden from some queries."""
    pages = make_pages([[50, 33], [0, 56]], page_size=8, num_queries=num_queries, dim=16)
    held = {name: getattr(pages, name).clamp(max=3e4).to(dtype).double() for name in ("query", "key", "keys")}
    for name, tensor in held.items():
        setattr(pages, name, tensor)
    case = scores.make_paged(pages if bits is None else pages.quantized(bits))
    query, lse = pages.query.to(device, dtype), case.lse.to(device, torch.float32)
    keys = case.pages.keys.to(device, dtype if bits is None else torch.uint8)
    layout = pages.table.to(device), pages.lengths.to(device), case.positions.to(device)
    field = torch.zeros(case.key_positions.shape, device=device)
    options = {"key_positions": case.key_positions.to(device), "bits": bits}
    for tile in paged_tiles(query, keys, lse, scores.SCALE, *layout, **options):
        tile.add(field, tile.column_sums())
    expected = scores.by_key_head(case.rows, 2)
    assert (case.by_slot(field.cpu()).double() - expected).norm() < TOLERANCES[dtype] * expected.norm()
