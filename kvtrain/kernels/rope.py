"""Rotary position embedding (Su et al. 2021), half-split layout, angles in at least float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels import liger
from kvtrain.kernels.cpu_tiling import row_tiles
from kvtrain.kernels.dispatch import at_least_float32, wide_dtype


def rotary_angles(inverse_frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(B, T, D)`` of every position.

    Args:
        inverse_frequencies: ``(D / 2,)``.
        position_ids: ``(B, T)``.
        dtype: Dtype of the model; half types are promoted to float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = position_ids.to(wide).unsqueeze(-1) * inverse_frequencies.to(wide)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def apply_rotary(
    heads: Tensor, cos: Tensor, sin: Tensor, *, halves_repeat: bool = False, backend: str = "auto"
) -> Tensor:
    """Rotate ``(B, H, T, D)`` by angles ``(B, T, D)``; computed wide, returned in the dtype of ``heads``.

    Args:
        heads: ``(B, H, T, D)``.
        cos: ``(B, T, D)``.
        sin: ``(B, T, D)``.
        halves_repeat: The second half of the angles repeats the first, as ``rotary_angles`` makes them and DMC does
            not leave them; Liger's kernel reads the first half alone, and needs this promise.
        backend: ``"auto"``, ``"liger"`` or ``"torch"``.

    Raises:
        ValueError: The backend cannot run this call; Liger needs ``halves_repeat``.
    """
    fits = halves_repeat and cos.dtype == sin.dtype == torch.float32 and not (cos.requires_grad or sin.requires_grad)
    asked = liger.on_gpu(heads) or backend != "auto"
    if asked and liger.takes_liger("rotary embedding", backend, heads, cos, sin, fits=fits):
        rotated: Tensor = liger.LigerRotary.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    if cos.requires_grad or sin.requires_grad:
        learnt: Tensor = _rotate_by_learnt(heads, cos, sin)
        return learnt
    if heads.shape[2] == 1 and not (torch.is_grad_enabled() and heads.requires_grad):
        return _formula(heads, cos, sin)
    result: Tensor = _Rotary.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
    return result


def _formula(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = at_least_float32(heads)
    return (wide * cos.unsqueeze(1) + _turn(wide) * sin.unsqueeze(1)).to(heads.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rotate_by_learnt(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, with a gradient for the angles; what a compiler makes of that trips over strides."""
    return _formula(heads, cos, sin)


class _Rotary(torch.autograd.Function):
    """By angles that are not learnt: backward is a rotation, too, and nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -torch.cat(sin.chunk(2, -1)[::-1], -1)), None, None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A few rows at a time, so that what is wide stays near the processor."""
    result, half, wide = torch.empty_like(heads), heads.shape[-1] // 2, wide_dtype(heads.dtype)
    cos, sin = cos.expand(len(heads), -1, -1).unsqueeze(1), sin.expand(len(heads), -1, -1).unsqueeze(1)
    for rows in row_tiles(heads):
        part = heads[rows].to(wide)
        first, second, turned = part[..., :half], part[..., half:], part * cos[rows]
        turned[..., :half].sub_(second * sin[rows][..., :half])
        turned[..., half:].add_(first * sin[rows][..., half:])
        result[rows] = turned
    return result


def _turn(heads: Tensor) -> Tensor:
    """A quarter turn of every pair of channels ``d`` and ``d + D / 2``."""
    half = heads.shape[-1] // 2
    return torch.cat([-heads[..., half:], heads[..., :half]], -1)
