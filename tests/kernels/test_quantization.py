"""Packed vectors: their bytes by hand, the error of a channel, and that a second packing changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.kernels.quantization import dequantize, packed_channels, packed_width, quantize

PROPERTY = settings(max_examples=150)
BITS = [8, 4, 2]
LARGEST = 65504.0  # of float16


def constants(packed):
    """Scales and zeros ``(...)`` of packed vectors, as they are stored."""
    return packed[..., -4:].contiguous().view(torch.float16).unbind(-1)


def round_trip(states, bits, dtype=torch.float64):
    return dequantize(quantize(states, bits), bits, states.shape[-1], dtype)


def half_bytes(*numbers):
    return list(torch.tensor(numbers, dtype=torch.float16).view(torch.uint8))


def test_bytes_by_hand():
    """Codes, scale, zero; in 4 bits the second half of the channels in the upper halves of the bytes, and so on."""
    eight = quantize(torch.tensor([[-1.0, 126.5, 0.0, 0.2]]), 8)
    assert eight.tolist() == [[0, 255, 2, 2, *half_bytes(0.5, -1.0)]]
    four = quantize(torch.tensor([[3.0, 33.0, 5.0, 8.9], [0.0, 0.0, 15.0, 7.4]]), 4)
    assert four.tolist() == [
        [0 + (1 << 4), 15 + (3 << 4), *half_bytes(2.0, 3.0)],
        [0 + (15 << 4), 0 + (7 << 4), *half_bytes(1.0, 0.0)],
    ]
    two = quantize(torch.tensor([[3.0, 9.0, 5.1, 3.0, 7.0, 5.0, 9.0, 6.8]]), 2)
    assert two.tolist() == [
        [0 + (1 << 2) + (2 << 4) + (3 << 6), 3 + (0 << 2) + (1 << 4) + (2 << 6), *half_bytes(2.0, 3.0)]
    ]
    assert dequantize(two, 2, 8, torch.float32).tolist() == [[3.0, 9.0, 5.0, 3.0, 7.0, 5.0, 9.0, 7.0]]
    assert dequantize(eight, 8, 4, torch.float32).tolist() == [[-1.0, 126.5, 0.0, 0.0]]
    assert dequantize(four, 4, 4, torch.float64).tolist() == [[3.0, 33.0, 5.0, 9.0], [0.0, 0.0, 15.0, 7.0]]


@st.composite
def vectors(draw):
    """Gaussian channels of any size around any mean, a few of which are equal."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    states = torch.randn(40, 4 * draw(st.integers(1, 10)), generator=random, dtype=torch.float64)
    states[:5] = states[:5, :1]
    return states * 10 ** draw(st.floats(-9, 4)) + draw(st.sampled_from([-1, 0, 1])) * 10 ** draw(st.floats(-9, 4))


@PROPERTY
@given(vectors(), st.sampled_from(BITS), st.sampled_from([torch.float32, torch.float64]))
def test_packing_again_changes_no_byte(states, bits, dtype):
    packed = quantize(states.to(dtype), bits)
    again = dequantize(packed, bits, states.shape[-1], dtype)
    assert torch.equal(quantize(again, bits), packed)
    assert torch.equal(dequantize(quantize(again, bits), bits, states.shape[-1], dtype), again)


@PROPERTY
@given(vectors(), st.sampled_from(BITS))
def test_a_channel_is_within_half_a_scale(states, bits):
    """And the scale is what the vector's range asks for, unless its least channel or float16 forbid one so fine."""
    scale, _ = (constant.double() for constant in constants(quantize(states, bits)))
    off = (round_trip(states, bits) - states).abs().amax(-1)
    assert (off <= scale * 0.5001).all()
    low, high = states.aminmax(dim=-1)
    needed = (high - low) / (2**bits - 1)
    finest = torch.maximum(low.abs() / 1000, torch.tensor(2.0 ** (bits - 24), dtype=torch.float64))
    rounded = 2.0**-25  # half of what lies between the least numbers of float16
    assert (scale <= 1.04 * torch.maximum(needed + low.abs() / 2000 / (2**bits - 1), finest) + rounded).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("number", [0.0, -0.0, 1.5, -3e-5, 60000.0, -LARGEST, 1e-30])
def test_equal_channels(bits, number):
    """As exact as float16."""
    packed = quantize(torch.full((2, 8), number), bits)
    assert packed[:, :-4].eq(0).all()
    expected = torch.full((2, 8), number).half().float()
    assert torch.equal(dequantize(packed, bits, 8, torch.float32), expected)


@pytest.mark.parametrize("bits", BITS)
def test_half_types_are_computed_wide(bits):
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        packed = quantize(states.to(dtype), bits)
        assert torch.equal(packed, quantize(states.to(dtype).double(), bits))
        opened = dequantize(packed, bits, 16, dtype)
        assert opened.dtype == dtype
        assert torch.equal(opened, dequantize(packed, bits, 16, torch.float32).to(dtype))


def test_what_float16_cannot_hold_saturates_and_nan_stays_in_its_vector():
    states = torch.tensor([[-1e9, 0.0], [1e9, 1e9], [0.0, float("inf")], [float("nan"), 1.0], [1.0, 2.0]])
    low, high, infinite, nan, plain = round_trip(states, 8)
    assert low[0] == -LARGEST and low[1].abs() < 200
    assert high.eq(256 * LARGEST).all()
    assert infinite.tolist() == [0.0, 255 * LARGEST]
    assert nan.isnan().all() and plain[0] == 1.0 and abs(plain[1] - 2) < 1 / 255


@pytest.mark.parametrize(("bits", "dim"), [(8, 1), (8, 3), (8, 64), (4, 2), (4, 6), (4, 64), (2, 4), (2, 12), (2, 64)])
def test_slots_of_any_width_in_any_layout(bits, dim):
    """Float16 constants that lie on odd addresses, and slots that are part of something larger."""
    states = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packed, expected = quantize(states, bits), round_trip(states, bits)
    width = packed_width(dim, bits)
    assert packed.shape == (3, 5, width) and width == dim * bits // 8 + 4 and packed_channels(width, bits) == dim
    assert torch.equal(quantize(states.mT.contiguous().mT, bits), packed)
    shifted = torch.zeros(3, 5, width + 3, dtype=torch.uint8)[..., 2 : width + 2].copy_(packed)
    for part, wanted in ((shifted, expected), (packed[1:, 2::2], expected[1:, 2::2]), (shifted[2, 3], expected[2, 3])):
        assert torch.equal(dequantize(part, bits, dim, torch.float64), wanted)
    assert torch.equal(dequantize(packed.transpose(0, 1), bits, dim, torch.float64), expected.transpose(0, 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [1, 4, 6, 12, 24])
def test_groups_are_packed_as_vectors_of_their_own(bits, group):
    """With codes first, then all scales, then all zeros."""
    states = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    packed = quantize(states, bits, group)
    assert (
        packed.shape == (3, 5, packed_width(24, bits, group))
        and packed_width(24, bits, group) == 3 * bits + 96 // group
    )
    assert packed_channels(packed.shape[-1], bits, group) == 24
    read = dequantize(packed, bits, 24, torch.float64, group)
    if group * bits % 8 == 0:
        assert torch.equal(read, round_trip(states.view(3, 5, -1, group), bits).flatten(-2))
    assert torch.equal(quantize(read, bits, group), packed)
    if group == 24:
        assert torch.equal(packed, quantize(states, bits))
    scales, zeros = packed[..., 3 * bits :].contiguous().view(torch.float16).chunk(2, -1)
    assert torch.equal(zeros, states.view(3, 5, -1, group).amin(-1).half())
    assert ((read - states).view(3, 5, -1, group).abs().amax(-1) <= 0.5001 * scales.double()).all()


@pytest.mark.parametrize("bits", BITS)
def test_no_vectors_and_bytes_of_unused_slots(bits):
    assert quantize(torch.zeros(0, 3, 8), bits).shape == (0, 3, packed_width(8, bits))
    assert round_trip(torch.zeros(2, 0, 8), bits).shape == (2, 0, 8)
    unused = torch.zeros(2, packed_width(8, bits), dtype=torch.uint8)
    assert dequantize(unused, bits, 8, torch.float32).eq(0).all()


def test_mistakes_name_the_remedy():
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, not 3; leave vectors as they are for more"):
        quantize(torch.zeros(3, 8), 3)
    for bits, dim, channels in ((4, 7, 2), (2, 6, 4)):
        message = f"{bits} bits hold {channels} channels a byte, and head_dim {dim} is no multiple of that; use 8 bits"
        with pytest.raises(ValueError, match=message):
            quantize(torch.zeros(3, dim), bits)
    for group in (3, 0, 16):
        with pytest.raises(ValueError, match=f"groups of {group} channels do not make up a head_dim of 8; use one of"):
            quantize(torch.zeros(3, 8), 4, group)
    packed = quantize(torch.zeros(3, 8), 8)
    with pytest.raises(ValueError, match="8 channels in 4 bits take 8 bytes, not 12; pass the bits"):
        dequantize(packed, 4, 8, torch.float32)
