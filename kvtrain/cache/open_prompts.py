"""Which rows are in the middle of a prompt, for caches that keep prompts whole until they end."""

from typing import Self

import torch
from torch import Tensor

from kvtrain.cache.rows import Placement, RowSnapshot
from kvtrain.cache.state import StateStore


class OpenPrompts(StateStore):
    """A mark on every row whose prompt has begun and of whose end nobody has said anything.

    Args:
        placement: Where tensors lie.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__({"open": ((), torch.bool)}, placement)
        self._some = False  # False: no row has one, which is known without asking the device

    def go_on(self, rows: Tensor) -> None:
        """The rows ``(B,)`` bool have read a part of their prompts."""
        self["open"] = self["open"] | rows.to(self.placement.device)
        self._some = True

    def end(self, rows: Tensor) -> Tensor | None:
        """The prompts of the rows ``(B,)`` bool are over; those that were open, or None where none was."""
        if not self._some:
            return None
        opened = self["open"]
        ended = opened & rows.to(opened.device)
        left = opened & ~ended
        some, remain = torch.stack([ended.any(), left.any()]).tolist()
        self["open"] = left
        self._some = remain or self._narrowed is not None  # of the other rows nothing is known here
        return ended if some else None

    def join(self, other: Self) -> None:
        """See ``RowStore``."""
        super().join(other)
        self._some = True

    def restore_row(self, row: int, snapshot: RowSnapshot) -> None:
        """See ``RowStore``."""
        super().restore_row(row, snapshot)
        self._some = True
