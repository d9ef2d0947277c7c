"""Tokens of a row in another order, or some of them: kernels and caches want a row's padding before its tokens."""

import torch
from torch import Tensor


def padding_first(real: Tensor) -> Tensor:
    """The order ``(B, n)`` in which padding stands before real tokens ``(B, n)``, each among themselves as they were.

    ``order.argsort(1)`` leads back.
    """
    return real.to(torch.int8).argsort(dim=1, stable=True)


def take_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """``(B, n, ...)`` in the order ``(B, m)``."""
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return tensor[rows, order]


def take_slots(tensor: Tensor, order: Tensor) -> Tensor:
    """``(B, H, n, ...)`` in the order ``(B, m)``, all heads alike."""
    inner = tensor.shape[3:]
    index = order.view(order.shape[0], 1, -1, *[1] * len(inner)).expand(-1, tensor.shape[1], -1, *inner)
    return tensor.gather(2, index)


def block_columns(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Columns ``(B, W)`` of the tokens marked in ``(B, S)``, a run at the end of every row, and which of them count."""
    size = inside.shape[1]
    column = torch.arange(1, size + 1, device=inside.device)
    end = (inside * column).amax(1, keepdim=True)
    width = int(inside.sum(1).max())
    columns = end - width + torch.arange(width, device=inside.device)
    count = inside.sum(1, keepdim=True)
    return columns.clamp(min=0), torch.arange(width, device=inside.device) >= width - count
