"""One rule for choosing how an operation runs, and one line that says what was chosen."""

import contextlib
import functools
import logging
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

logger = logging.getLogger("kvtrain")

# Names of backends, with commas between them, that "auto" passes over: a way round one that fails on some machine.
AVOID = "KVTRAIN_AVOID"


def at_least_float32(tensor: Tensor) -> Tensor:
    """Promote half types to float32; leave float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@functools.cache
def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types, which sums and products are computed in; others stay."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of ``(B, H, m, n)`` and ``(B, H, n, k)`` in at least float32, never rounded to a half type."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return product.view(*left.shape[:2], *product.shape[1:])
    return at_least_float32(left) @ at_least_float32(right)


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """Keep autocast out of an operation that chooses its own dtypes."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU; elsewhere that takes many times as long as in float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_backend(operation: str, requested: str, available: tuple[str, ...]) -> str:
    """Resolve ``"auto"`` to the first available backend; refuse an explicit one that is not there.

    ``KVTRAIN_AVOID=flex,liger`` in the environment lets ``"auto"`` pass over backends, so long as another is left. It
    is read when an operation first has this choice.

    Args:
        operation: Name for messages, such as ``"attention"``.
        requested: ``"auto"`` or the name of a backend.
        available: Backends that can run this call, best first.

    Raises:
        ValueError: The requested backend cannot run this call here.
    """
    return _chosen(operation, requested, available)


@functools.cache  # asked in every layer of every step
def _chosen(operation: str, requested: str, available: tuple[str, ...]) -> str:
    if requested != "auto" and requested not in available:
        raise ValueError(
            f"{operation}: backend {requested!r} cannot run this call; use 'auto' or one of {', '.join(available)}"
        )
    avoided = os.environ.get(AVOID, "").split(",")
    wanted = [name for name in available if name not in avoided] or available
    backend = wanted[0] if requested == "auto" else requested
    log_backend(operation, backend)
    return backend


@functools.cache
def log_backend(operation: str, backend: str) -> None:
    """Say once per process which backend runs an operation."""
    logger.info("%s runs on the %s backend", operation, backend)
