"""Attention over pages, plain and quantized, and the quantization itself, on every device."""

from dataclasses import fields, replace
from functools import cache

import pytest
import torch

from kvtrain.kernels.attention import attention
from kvtrain.kernels.block_codec import BlockCodec, PackedBlocks
from kvtrain.kernels.paged_attention import paged_attention
from kvtrain.kernels.quantization import dequantize, quantize
from tests.kernels.test_paged_attention import Pages, make_pages

from .kernel_calls import normal

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
# More slots than are copied at a time, one head without any, and rows that end early.
LENGTHS = [[1300, 40], [0, 1025]]
SCALE = 0.4


@cache
def pages(bits: int | None, num_queries: int, dtype: torch.dtype) -> Pages:
    """Of what ``dtype`` can hold, in float64."""
    case = make_pages(LENGTHS, page_size=32, num_queries=num_queries, dim=16)
    # What lies in free slots is large, and would be infinite in float16.
    names = ("query", "key", "value", "keys", "values")
    held = {name: getattr(case, name).clamp(max=3e4).to(dtype).double() for name in names}
    case = replace(case, **held)
    return case if bits is None else case.quantized(bits)


def on(case: Pages, device: str, dtype: torch.dtype) -> Pages:
    """A case with its tensors there, those that are not packed in that dtype."""
    tensors = {f.name: getattr(case, f.name) for f in fields(case) if f.name != "codec"}
    moved = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
    return replace(case, **moved)


def attended(case: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"codec": case.codec, "backend": "auto"}
    return paged_attention(case.query, case.keys, case.values, case.table, case.lengths, SCALE, **options)


@DTYPES
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("bits", [None, 8, 4, 2])
def test_it_is_attention_over_what_the_pages_hold(bits: int | None, num_queries: int, dtype: torch.dtype, device: str):
    """Few queries read every page where it lies, many read copies of runs; either way queries get their gradients."""
    case = pages(bits, num_queries, dtype)
    there = on(case, device, dtype)
    results = []
    for query, attend in ((there.query, lambda q: attended(replace(there, query=q))), (case.query, None)):
        query = query.clone().requires_grad_()
        output, lse = attend(query) if attend else replace(case, query=query).dense()
        factors = normal(*output.shape, seed=1).to(output.device)
        loss = (output.double() * factors).sum() + lse.double().masked_fill(lse == -torch.inf, 0.0).sum()
        results.append([tensor.cpu() for tensor in (output, lse, *torch.autograd.grad(loss, query))])
    for found, exact in zip(*results, strict=True):
        seen = exact.isfinite()
        assert torch.equal(found.isfinite(), seen)
        assert (found.double() - exact)[seen].norm() < TOLERANCES[dtype] * exact[seen].norm()


@pytest.mark.parametrize("num_queries", [1, 40])
def test_no_gradient_asked_for(num_queries: int, device: str):
    """As decoding calls it."""
    with torch.no_grad():
        output, lse = attended(on(pages(None, num_queries, torch.float32), device, torch.float32))
    exact = pages(None, num_queries, torch.float32).dense()[0]
    assert (output.cpu().double() - exact).norm() < 2e-5 * exact.norm()
    assert lse[1, :2].eq(-torch.inf).all()


@DTYPES
@pytest.mark.parametrize("num_queries", [1, 40])
def test_packed_blocks(num_queries: int, dtype: torch.dtype, device: str):
    """They come near what was packed, and attention reads what they hold."""
    codec = PackedBlocks(BlockCodec(16, 8, "channel", 4, 1, 2), BlockCodec(16, 8, "token", 4, 1, 2))
    keys, values = (normal(3, 1, 16, 8, seed=seed).to(device, dtype) for seed in (1, 2))
    packed = codec.keys.pack(keys), codec.values.pack(values)
    opened = codec.open(*packed, torch.float32)
    for states, held in zip((keys, values), opened, strict=True):
        assert (states.flatten(1, 2).float() - held).norm() < 0.07 * states.float().norm()
    table, lengths = torch.tensor([[[2, 0, 1]]], device=device), torch.tensor([[48]], device=device)
    query = normal(1, 2, num_queries, 8, seed=3).to(device, dtype)
    output, lse = paged_attention(query, *packed, table, lengths, SCALE, codec=codec)
    held = (states[[2, 0, 1]].flatten(0, 1)[None, None].double() for states in opened)
    exact, sums = attention(query.double(), *held, causal=False, scale=SCALE)
    assert (output.double() - exact).norm() < TOLERANCES[dtype] * exact.norm()
    assert (lse.double() - sums).norm() < TOLERANCES[dtype] * sums.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization(bits: int, device: str):
    """Within half a code, the same bytes when packed again, and read alike by the device and the CPU."""
    states = normal(500, 32, seed=3).float().to(device)
    packed = quantize(states, bits)
    found = dequantize(packed, bits, 32, torch.float32)
    span = states.amax(-1, keepdim=True) - states.amin(-1, keepdim=True)
    assert ((found - states).abs() <= 0.502 * span / (2**bits - 1) + 2e-3).all()
    assert torch.equal(quantize(found, bits), packed)
    torch.testing.assert_close(found.cpu(), dequantize(packed.cpu(), bits, 32, torch.float32))
