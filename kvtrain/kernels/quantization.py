"""Vectors in 8 or 4 bits a channel, each with a scale and a zero of its own.

A vector of D channels becomes ``bits * D / 8`` bytes of codes with two float16 behind them, the scale and the zero:
``x = zero + code * scale``. The zero is the smallest channel, the largest code stands for the largest channel
(asymmetric, one group a vector).

The scale is never below the zero's own float16 spacing, so that rounding the zero moves no channel past the first code.
This keeps every channel within half a scale of what it was, and makes quantizing again what was dequantized to float32
or wider give the same bytes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.dispatch import at_least_float32

_CONSTANTS = 4  # bytes of a scale and a zero
_LARGEST = torch.finfo(torch.float16).max
_SPACING = 2**-10  # of float16, as a share of the number; at most twice what it is


def packed_width(head_dim: int, bits: int) -> int:
    """Bytes of one vector.

    Args:
        head_dim: Its channels.
        bits: Of each, 8 or 4.

    Raises:
        ValueError: Other bits, or an odd vector in 4.
    """
    _check_bits(bits)
    if bits == 4 and head_dim % 2:
        raise ValueError(f"4 bits hold two channels a byte, and head_dim {head_dim} is odd; use 8 bits")
    return head_dim * bits // 8 + _CONSTANTS


def packed_channels(width: int, bits: int) -> int:
    """Channels of a vector that takes ``width`` bytes; the inverse of ``packed_width``."""
    return (width - _CONSTANTS) * 8 // bits


def quantize(states: Tensor, bits: int) -> Tensor:
    """Pack vectors.

    What lies beyond float16 saturates: a zero at its limits, a scale at its upper one. NaN makes its vector NaN.

    Args:
        states: ``(..., D)``.
        bits: 8 or 4.

    Returns:
        uint8 ``(..., packed_width(D, bits))``.

    Raises:
        ValueError: See ``packed_width``.
    """
    packed_width(states.shape[-1], bits)
    wide, levels = at_least_float32(states), 2**bits - 1
    low, high = wide.aminmax(dim=-1, keepdim=True)
    zero = low.clamp(-_LARGEST, _LARGEST).half() + 0.0  # there is no second, negative zero
    # The second bound keeps float16's rounding of a scale below half a code, all codes together.
    smallest = (zero.to(wide).abs() * _SPACING).clamp(min=2.0 ** (bits - 24))
    scale = torch.maximum((high - zero.to(wide)) / levels, smallest).clamp(max=_LARGEST).half()
    codes = ((wide - zero.to(wide)) / scale.to(wide)).round().clamp(0, levels).to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = first | second << 4
    return torch.cat([codes, torch.cat([scale, zero], -1).view(torch.uint8)], -1)


def dequantize(packed: Tensor, bits: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Vectors ``(..., D)`` again.

    Args:
        packed: uint8 ``(..., packed_width(D, bits))``.
        bits: 8 or 4, as they were packed.
        head_dim: D.
        dtype: Of the result; what is narrower than float32 is computed there.

    Raises:
        ValueError: The bytes of a vector are not those of ``head_dim`` channels in so many bits.
    """
    if packed.shape[-1] != packed_width(head_dim, bits):
        raise ValueError(
            f"{head_dim} channels in {bits} bits take {packed_width(head_dim, bits)} bytes, not {packed.shape[-1]}; "
            "pass the bits and the width that quantize was given"
        )
    compute = torch.promote_types(dtype, torch.float32)
    # A copy: float16 can be read only where it is aligned, which a slot of odd width is not.
    constants = packed[..., -_CONSTANTS:].clone(memory_format=torch.contiguous_format).view(torch.float16).to(compute)
    scale, zero = constants.chunk(2, -1)
    return _codes(packed, bits).to(compute).mul_(scale).add_(zero).to(dtype)


def read_back(states: Tensor, bits: int | None) -> Tensor:
    """Vectors as they are read again once they have been kept in so many bits.

    A gradient passes as if nothing had been rounded.

    Args:
        states: ``(..., D)``.
        bits: 8 or 4; None keeps them as they are.

    Raises:
        ValueError: See ``packed_width``.
    """
    if bits is None:
        return states
    if not (torch.is_grad_enabled() and states.requires_grad):
        return dequantize(quantize(states, bits), bits, states.shape[-1], states.dtype)
    result: Tensor = _ReadBack.apply(states, bits)  # type: ignore[no-untyped-call]
    return result


class _ReadBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, bits: int) -> Tensor:
        return dequantize(quantize(states, bits), bits, states.shape[-1], states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _codes(packed: Tensor, bits: int) -> Tensor:
    """``(..., D)`` uint8."""
    if bits == 8:
        return packed[..., :-_CONSTANTS]
    # Constants and all: whole slots are contiguous, their codes are not, and bits of those take several times as long.
    first, second = packed & 15, packed >> 4
    return torch.cat([first[..., :-_CONSTANTS], second[..., :-_CONSTANTS]], -1)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}; leave vectors as they are for more")
