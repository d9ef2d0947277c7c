"""Vectors in 8, 4 or 2 bits a channel, with a scale and a zero for each, or for each group of its channels.

A vector of D channels becomes ``bits * D / 8`` bytes of codes with the float16 scales behind them and then the zeros:
``x = zero + code * scale``. The zero is the smallest channel of a group, the largest code stands for the largest one
(asymmetric); a group is the whole vector unless it is said to be less.

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


def packed_width(head_dim: int, bits: int, group: int | None = None) -> int:
    """Bytes of one vector.

    Args:
        head_dim: Its channels.
        bits: Of each, 8, 4 or 2.
        group: Channels that share a scale and a zero; None: all.

    Raises:
        ValueError: Other bits, a vector that leaves a byte half empty, or groups that do not make it up.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, not {bits}; leave vectors as they are for more")
    if head_dim * bits % 8:
        raise ValueError(
            f"{bits} bits hold {8 // bits} channels a byte, and head_dim {head_dim} is no multiple of that; use 8 bits"
        )
    group = head_dim if group is None else group
    if group < 1 or head_dim % group:
        raise ValueError(f"groups of {group} channels do not make up a head_dim of {head_dim}; use one of its divisors")
    return head_dim * bits // 8 + head_dim // group * _CONSTANTS


def packed_channels(width: int, bits: int, group: int | None = None) -> int:
    """Channels of a vector that takes ``width`` bytes; the inverse of ``packed_width``."""
    if group is None:
        return (width - _CONSTANTS) * 8 // bits
    return width * 8 * group // (bits * group + 8 * _CONSTANTS)


def quantize(states: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Pack vectors.

    What lies beyond float16 saturates: a zero at its limits, a scale at its upper one. NaN makes its group NaN.

    Args:
        states: ``(..., D)``.
        bits: 8, 4 or 2.
        group: Channels that share a scale and a zero; None: all.

    Returns:
        uint8 ``(..., packed_width(D, bits, group))``.

    Raises:
        ValueError: See ``packed_width``.
    """
    packed_width(states.shape[-1], bits, group)
    wide, levels = at_least_float32(states).unflatten(-1, (-1, group or states.shape[-1])), 2**bits - 1
    low, high = wide.aminmax(dim=-1, keepdim=True)
    zero = low.clamp(-_LARGEST, _LARGEST).half() + 0.0  # there is no second, negative zero
    # The second bound keeps float16's rounding of a scale below half a code, all codes together.
    smallest = (zero.to(wide).abs() * _SPACING).clamp(min=2.0 ** (bits - 24))
    scale = torch.maximum((high - zero.to(wide)) / levels, smallest).clamp(max=_LARGEST).half()
    codes = ((wide - zero.to(wide)) / scale.to(wide)).round().clamp(0, levels).to(torch.uint8).flatten(-2)
    constants = torch.cat([scale, zero], -2).squeeze(-1)  # (..., 2 D / group)
    return torch.cat([_packed_codes(codes, bits), constants.view(torch.uint8)], -1)


def dequantize(packed: Tensor, bits: int, head_dim: int, dtype: torch.dtype, group: int | None = None) -> Tensor:
    """Vectors ``(..., D)`` again.

    Args:
        packed: uint8 ``(..., packed_width(D, bits, group))``.
        bits: As they were packed.
        head_dim: D.
        dtype: Of the result; what is narrower than float32 is computed there.
        group: As they were packed.

    Raises:
        ValueError: The bytes of a vector are not those of ``head_dim`` channels in so many bits and such groups.
    """
    width = packed_width(head_dim, bits, group)
    if packed.shape[-1] != width:
        raise ValueError(
            f"{head_dim} channels in {bits} bits take {width} bytes, not {packed.shape[-1]}; "
            "pass the bits and the width that quantize was given"
        )
    compute = torch.promote_types(dtype, torch.float32)
    size = width - head_dim * bits // 8
    # A copy: float16 can be read only where it is aligned, which a slot of odd width is not.
    constants = packed[..., -size:].clone(memory_format=torch.contiguous_format).view(torch.float16).to(compute)
    # Apart: what broadcasts from a piece of something larger takes several times as long.
    scale, zero = (part.contiguous().unsqueeze(-1) for part in constants.chunk(2, -1))  # (..., D / group, 1)
    codes = _codes(packed, bits, size).to(compute).unflatten(-1, (-1, group or head_dim))
    vectors: Tensor = codes.mul_(scale).add_(zero).flatten(-2)
    return vectors.to(dtype)


def read_back(states: Tensor, bits: int | None) -> Tensor:
    """Vectors as they are read again once they have been kept in so many bits.

    A gradient passes as if nothing had been rounded.

    Args:
        states: ``(..., D)``.
        bits: 8, 4 or 2; None keeps them as they are.

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


def _packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(..., D)`` with several in a byte, those of the first channels in its low bits."""
    packed, *others = codes.chunk(8 // bits, -1)
    for place, part in enumerate(others, 1):
        packed = packed | part << place * bits
    return packed


def _codes(packed: Tensor, bits: int, constants: int) -> Tensor:
    """``(..., D)`` uint8, of vectors behind whose codes are so many bytes."""
    if bits == 8:
        return packed[..., :-constants]
    # Constants and all: whole slots are contiguous, their codes are not, and bits of those take several times as long.
    parts, levels = [], 2**bits - 1
    for _ in range(8 // bits - 1):
        parts.append((packed & levels)[..., :-constants])
        packed = packed >> bits
    return torch.cat([*parts, packed[..., :-constants]], -1)
