"""A plain host with one row whose loss, or whose gradient alone, is not finite."""

from typing import Any

import torch
from torch import Tensor

from kvtrain.data.packing import Batch
from tests.hosts import make_host

from .tiny_runs import TinyFull


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class PlantedFull(TinyFull):
    """Trains well until it meets one row.

    Args:
        what: ``loss``, ``gradient`` or nothing.
        row: The row.
    """

    def __init__(self, what: str, row: int) -> None:
        super().__init__()
        self.what, self.row = what, row

    def plain_config(self) -> Any:
        return make_host().config

    def pretrained_weights(self) -> None:
        """None: there is no base on disk."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.row not in batch["row_ids"]:
            return loss
        return {"loss": lambda: loss + float("inf"), "gradient": lambda: _InfiniteGradient.apply(loss)}.get(
            self.what, lambda: loss
        )()
