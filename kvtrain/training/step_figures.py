"""Figures of an optimizer step: what its micro-batches on all ranks come to together."""

from collections.abc import Callable
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


class _Figure(NamedTuple):
    total: Tensor
    transform: Transform | None
    prog_bar: bool


class StepFigures:
    """Adds up what micro-batches have to say of an optimizer step, so that one reduction tells of all ranks.

    Every micro-batch of every rank adds its share of the same figures: a sum over its tokens divided by the targets of
    the whole step, or a mean divided by the number of micro-batches.
    """

    def __init__(self) -> None:
        self._figures: dict[str, _Figure] = {}

    def clear(self) -> None:
        """Begin a step."""
        self._figures = {}

    def add(self, name: str, share: Tensor, *, transform: Transform | None = None, prog_bar: bool = False) -> None:
        """Add a micro-batch's share of a figure.

        Args:
            name: Of the figure.
            share: Without a gradient, ``()``.
            transform: What is logged of the sum of all shares; None logs the sum itself.
            prog_bar: Whether the progress bar shows it.
        """
        before = self._figures.get(name)
        total = share.detach() if before is None else before.total + share.detach()
        self._figures[name] = _Figure(total, transform, prog_bar)

    def log(self, module: pl.LightningModule) -> None:
        """Log what the step came to over all ranks, each of which calls this; logged figures are gone."""
        if not self._figures:
            return
        totals = torch.stack([figure.total for figure in self._figures.values()])
        if module.trainer.world_size > 1:
            totals = module.trainer.strategy.reduce(totals, reduce_op="sum")
        for (name, figure), total in zip(self._figures.items(), totals, strict=True):
            module.log(name, figure.transform(total) if figure.transform else total, prog_bar=figure.prog_bar)
        self.clear()
