"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6)."""

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.liger import LigerSwiGLU, takes_liger


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``, element by element, computed in at least float32.

    Liger rounds ``silu(gate)`` to a half type before the product, as transformers does; torch rounds once.

    Args:
        gate: ``(..., D)`` before the activation.
        up: ``(..., D)``.
        backend: ``"auto"``, ``"liger"`` or ``"torch"``.

    Raises:
        ValueError: The backend cannot run this call.
    """
    if takes_liger("gate", backend, gate, up, fits=gate.shape == up.shape and gate.dtype == up.dtype):
        gated: Tensor = LigerSwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return gated
    wide = torch.nn.functional.silu(at_least_float32(gate)) * at_least_float32(up)
    return wide.to(up.dtype)
