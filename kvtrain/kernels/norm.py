"""Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4), computed in at least float32."""

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * hidden / rms(hidden)`` over the last axis, in the dtype of ``hidden``.

    Args:
        hidden: ``(..., D)``.
        weight: ``(D,)``.
        epsilon: Added to the mean square.
    """
    wide = at_least_float32(hidden)
    normed = torch.nn.functional.rms_norm(wide, weight.shape, weight.to(wide.dtype), epsilon)
    return normed.to(hidden.dtype)
