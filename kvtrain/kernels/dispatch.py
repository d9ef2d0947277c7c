"""One rule for choosing how an operation runs, and one line that says what was chosen."""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("kvtrain")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Promote half types to float32; leave float32 and float64 as they are (DESIGN: numerics)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@functools.cache
def log_backend(operation: str, backend: str) -> None:
    """Say once per process which backend runs an operation."""
    logger.info("%s runs on the %s backend", operation, backend)


def choose_backend(operation: str, requested: str, available: list[str]) -> str:
    """Resolve ``"auto"`` to the first available backend; refuse an explicit one that is not there.

    Args:
        operation: Name for messages, such as ``"attention"``.
        requested: ``"auto"`` or the name of a backend.
        available: Backends that can run this call, best first.

    Raises:
        ValueError: The requested backend cannot run this call here.
    """
    if requested != "auto" and requested not in available:
        raise ValueError(
            f"{operation}: backend {requested!r} cannot run this call; "
            f"use 'auto' or one of {', '.join(available)}"
        )
    backend = available[0] if requested == "auto" else requested
    log_backend(operation, backend)
    return backend
