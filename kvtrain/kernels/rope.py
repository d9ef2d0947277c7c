"""Rotary position embedding (Su et al. 2021), half-split layout, angles in at least float32."""

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32


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


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``(B, H, T, D)`` by angles ``(B, T, D)``; computed wide, returned in the dtype of ``heads``."""
    wide = at_least_float32(heads)
    first, second = wide.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (wide * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(heads.dtype)
