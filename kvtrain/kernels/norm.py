"""Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4), computed in at least float32."""

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.liger import LigerRMSNorm, takes_liger


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, *, backend: str = "auto") -> Tensor:
    """``weight * hidden / rms(hidden)`` over the last axis, in the dtype of ``hidden``.

    Args:
        hidden: ``(..., D)``.
        weight: ``(D,)``.
        epsilon: Added to the mean square.
        backend: ``"auto"``, ``"liger"`` or ``"torch"``.

    Raises:
        ValueError: The backend cannot run this call.
    """
    if takes_liger("norm", backend, hidden, weight):
        normed: Tensor = LigerRMSNorm.apply(hidden, weight, epsilon)  # type: ignore[no-untyped-call]
        return normed
    wide = at_least_float32(hidden)
    return torch.nn.functional.rms_norm(wide, weight.shape, weight.to(wide.dtype), epsilon).to(hidden.dtype)
