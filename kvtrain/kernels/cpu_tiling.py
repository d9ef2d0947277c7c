"""Work in slices: what several passes read and write should stay in a processor's cache."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_NUMBERS = 2**17  # 512 KiB of float32; several tensors of that size fit into the second level of a cache
_WITHOUT_VALUES = ContextVar("without_values", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Compute nothing of use, as where memory is foretold on tensors without values: slices alike are worked on once.

    What is held at most is the same to the byte: a whole slice after a whole one shows it, and a shorter one after it.
    """
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def without_values_now() -> bool:
    """Whether this is ``without_values``; what is compiled never is, and a compiler cannot ask."""
    return not torch.compiler.is_compiling() and _WITHOUT_VALUES.get()


def tiles_to_run(alike: range, odd: int = 0) -> range:
    """Which of equal parts have to be worked on: all; ``without_values`` the last two.

    Args:
        alike: Numbers of the parts, in order.
        odd: How many at the end differ from the others; they are kept beside the two.
    """
    return alike[-2 - odd :] if without_values_now() else alike


def spans(length: int, size: int) -> list[slice]:
    """Slices of ``size`` that cover ``length`` entries, the last perhaps shorter; ``without_values`` the last few.

    The list is shared by all who ask for the same: leave it as it is.
    """
    return _spans(length, size, without_values_now())


@functools.lru_cache(maxsize=4096)
def _spans(length: int, size: int, without_values: bool) -> list[slice]:
    starts = tiles_to_run(range(0, length, size), odd=int(length % size > 0))
    return [slice(start, start + size) for start in starts]


def rows_per_tile(tensor: Tensor) -> int:
    """How many entries of the first axis to take at a time: on a CPU what fits into its cache, elsewhere all."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return max(1, len(tensor))
    return max(1, _NUMBERS * len(tensor) // tensor.numel())


def row_tiles(tensor: Tensor) -> list[slice]:
    """Where to cut the first axis so that each part has ``rows_per_tile`` entries, the last perhaps fewer."""
    return _spans(len(tensor), rows_per_tile(tensor), without_values_now())


def tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching parts of tensors, in order; views of those that are contiguous, so that results can be written there.

    Args:
        *tensors: ``(..., D)`` each, with the same leading axes.
    """
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    rows = rows_per_tile(flat[0])
    cuts = _spans(len(flat[0]), rows, without_values_now())
    first = cuts[0].start if cuts else 0
    return zip(*[tensor[first:].split(rows) for tensor in flat], strict=True)
