"""Packed blocks against numpy, vector by vector, and against what the paper says of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtrain.kernels.block_codec import BlockCodec, PackedBlocks
from kvtrain.kernels.page_codec import RoundedVectors
from kvtrain.kernels.paged_attention import paged_attention
from tests.naive_blocks import naive_block

BY = ("channel", "token")


def blocks(seed, tokens, channels, leading=()):
    """Some channels are large in all tokens, as those of keys are."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(*leading, tokens, channels, generator=draw, dtype=torch.float64)
    return states * torch.randn(channels, generator=draw, dtype=torch.float64).exp()


@given(
    seed=st.integers(0, 999),
    by=st.sampled_from(BY),
    bits=st.sampled_from([2, 4, 8]),
    tokens=st.sampled_from([4, 8, 20]),
    channels=st.sampled_from([4, 12]),
    at_each_end=st.integers(0, 1),
    rank=st.integers(0, 5),
)
def test_a_block_is_what_numpy_makes_of_it(seed, by, bits, tokens, channels, at_each_end, rank):
    codec, block = BlockCodec(tokens, channels, by, bits, at_each_end, rank), blocks(seed, tokens, channels)
    packed = codec.pack(block)
    assert packed.shape == (codec.width,) and packed.dtype == torch.uint8
    expected, _ = naive_block(block.numpy(), by, bits, at_each_end, rank)
    np.testing.assert_allclose(codec.open(packed, torch.float64).numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("by", BY)
def test_a_block_does_not_depend_on_its_neighbours(by):
    codec, many = BlockCodec(16, 8, by, 2, 1, 2), blocks(1, 16, 8, leading=(3, 2))
    packed = codec.pack(many)
    for row in range(3):
        for head in range(2):
            assert torch.equal(packed[row, head], codec.pack(many[row, head]))
    opened = codec.open(packed, torch.float64)
    assert torch.equal(opened[2, 1], codec.open(packed[2, 1], torch.float64)) and opened.is_contiguous()
    assert codec.pack(many[:0]).shape == (0, 2, codec.width)


@pytest.mark.parametrize("by", BY)
def test_three_iterations_come_near_the_best_rank(by):
    """A singular value decomposition is the reference."""
    block = blocks(3, 64, 32)
    opened = BlockCodec(64, 32, by, 2, 1, 4).open(BlockCodec(64, 32, by, 2, 1, 4).pack(block), torch.float64)
    _, missed = naive_block(block.numpy(), by, 2, 1, 0)
    best = np.sqrt((np.linalg.svd(missed, compute_uv=False)[4:] ** 2).sum())
    found = float((block - opened).norm())
    assert best <= found <= 1.1 * best


@pytest.mark.parametrize(("channels", "keys", "values"), [(128, 0.297, 0.258), (32, 0.391, 0.469)])
def test_bytes_at_two_bits_and_rank_four(channels, keys, values):
    """As shares of bfloat16."""
    whole = 2 * 64 * channels
    assert BlockCodec(64, channels, "channel", 2, 1, 4).width / whole == pytest.approx(keys, abs=5e-4)
    assert BlockCodec(64, channels, "token", 2, 1, 4).width / whole == pytest.approx(values, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("by", BY)
def test_what_is_extreme_stays_finite(by, dtype):
    codec = BlockCodec(8, 8, by, 4, 1, 2)
    for value in (0.0, 1e-30, torch.finfo(dtype).max, -torch.finfo(dtype).max):
        block = torch.full((8, 8), value, dtype=dtype)
        opened = codec.open(codec.pack(block), torch.float32)
        assert opened.isfinite().all()
        torch.testing.assert_close(opened, block.float().clamp(-65504, 65504), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("num_queries", [1, 40])
def test_attention_over_blocks_is_attention_over_what_they_hold(num_queries):
    """One query goes by pages, many go by runs; heads have different numbers of blocks, and pool pages no order."""
    draw = torch.Generator().manual_seed(0)
    codec = PackedBlocks(BlockCodec(8, 4, "channel", 4, 1, 2), BlockCodec(8, 4, "token", 4, 1, 2))
    keys, values = (blocks(seed, 8, 4, leading=(7, 1)) for seed in (5, 6))
    packed = codec.keys.pack(keys), codec.values.pack(values)
    table, lengths = torch.tensor([[[6, 2, 0], [3, -1, -1]]]), torch.tensor([[24, 8]])
    query = torch.randn(1, 4, num_queries, 4, dtype=torch.float64, generator=draw)
    output, lse = paged_attention(query, *packed, table, lengths, 0.5, codec=codec)
    opened = codec.open(*packed, torch.float64)
    for head, owned in enumerate(([6, 2, 0], [3])):
        key, value = (states[owned].flatten(0, 1) for states in opened)
        for group in range(2):
            scores = query[0, 2 * head + group] @ key.T * 0.5
            torch.testing.assert_close(output[0, 2 * head + group], scores.softmax(-1) @ value)
            torch.testing.assert_close(lse[0, 2 * head + group], scores.logsumexp(-1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((64, 32, "token", 3), "bits must be 2, 4 or 8, not 3"),
        ((6, 32, "channel", 2), "vectors of 6 are no multiple of that; use 8 bits, or another block"),
        ((512, 32, "channel", 2, 1), "have places below 256, not 512; use outliers=0"),
        ((4, 32, "channel", 2, 2), "2 outliers at each end leave nothing of vectors of 4"),
    ],
)
def test_blocks_that_cannot_be_packed(settings, words):
    with pytest.raises(ValueError, match=words):
        BlockCodec(*settings)


def test_a_codec_of_other_channels_is_refused():
    packed, table, lengths = torch.zeros(2, 4, 12, dtype=torch.uint8), torch.tensor([[[0, 1]]]), torch.tensor([[8]])
    with pytest.raises(ValueError, match="queries have 4 channels, and the keys on these pages 8"):
        paged_attention(torch.zeros(1, 1, 1, 4), packed, packed, table, lengths, 1.0, codec=RoundedVectors(8))
