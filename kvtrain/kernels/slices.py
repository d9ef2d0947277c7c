"""Work in slices: what several passes read and write should stay in a processor's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

_NUMBERS = 2**17  # 512 KiB of float32; several tensors of that size fit into the second level of a cache


def rows_in_cache(tensor: Tensor) -> int:
    """How many entries of the first axis to take at a time: on a CPU what fits into its cache, elsewhere all."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return max(1, len(tensor))
    return max(1, _NUMBERS // tensor[0].numel())


def row_slices(tensor: Tensor) -> list[slice]:
    """Where to cut the first axis so that each part has ``rows_in_cache`` entries, the last perhaps fewer."""
    rows = rows_in_cache(tensor)
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching parts of tensors, in order; views of those that are contiguous.

    Args:
        *tensors: ``(..., D)`` each, with the same leading axes.
    """
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    rows = rows_in_cache(flat[0])
    return zip(*(tensor.split(rows) for tensor in flat), strict=True)


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous room for a result, so that slices of it are views."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
