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


def simple_rms_norm(hidden: Tensor, epsilon: float, *, epsilon_in_root: bool = False) -> Tensor:
    """``hidden / (rms(hidden) + epsilon)`` over the last axis, without weights, in the dtype of ``hidden``.

    Near zero its gradient is ``1 / epsilon`` times what comes in.

    Args:
        hidden: ``(..., D)``.
        epsilon: Added to the root of the mean square, or to the mean square.
        epsilon_in_root: Add it to the mean square.
    """
    wide = at_least_float32(hidden)
    if epsilon_in_root:
        return torch.nn.functional.rms_norm(wide, wide.shape[-1:], None, epsilon).to(hidden.dtype)
    rms: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
    return (wide / (rms + epsilon)).to(hidden.dtype)
