"""Tokens of a row in another order: kernels and caches want the padding of every row before its tokens."""

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
