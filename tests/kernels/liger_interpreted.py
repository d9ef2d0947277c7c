"""Runs Liger's kernels on Triton's interpreter and prints, as JSON, how far they are from torch in float64.

The interpreter must be chosen before Triton's kernels are imported, which is why this is a process of its own.
"""

import json
from typing import Any

import liger_kernel.ops.rms_norm as liger_norm
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from kvtrain.kernels import liger

from .liger_cases import autocast_errors, errors, refusals


class Scalar(float):
    """A float that a kernel may cast."""

    def to(self, _: Any) -> "Scalar":
        return self


@triton.jit
def _rsqrt(x):
    return 1.0 / tl.sqrt(x)


def mend_interpreter() -> None:
    """It hands floats over as Python's, which have no ``.to``, and knows nothing of CUDA's library of functions."""
    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda value: Scalar(value) if type(value) is float else convert(value)
    liger_norm.rsqrt = _rsqrt
    liger.on_gpu = lambda tensor: True


if __name__ == "__main__":
    mend_interpreter()
    report: dict[str, Any] = {str(dtype): errors(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    print(json.dumps(report | {"autocast": {"loss": autocast_errors()}, "refusals": refusals()}))
