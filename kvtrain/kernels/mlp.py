"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6)."""

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, element by element, computed in at least float32.

    Args:
        gate: ``(..., D)`` before the activation.
        up: ``(..., D)``.
    """
    wide = torch.nn.functional.silu(at_least_float32(gate)) * at_least_float32(up)
    return wide.to(up.dtype)
