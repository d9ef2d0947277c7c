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

    def among(self, rows: Tensor) -> Tensor | None:
        """Those of the rows ``(B,)`` bool whose prompts are open, or None where there are none."""
        if not self._some:
            return None
        opened = self["open"]
        ending = opened & rows.to(opened.device)
        some, any_open = torch.stack([ending.any(), opened.any()]).tolist()
        self._some = any_open or self._narrowed is not None  # of the other rows nothing is known here
        return ending if some else None

    def end(self, rows: Tensor) -> None:
        """The prompts of the rows ``(B,)`` bool are over."""
        self["open"] = self["open"] & ~rows

    def join(self, other: Self) -> None:
        """See ``RowStore``."""
        super().join(other)
        self._some = True

    def restore_row(self, row: int, snapshot: RowSnapshot) -> None:
        """See ``RowStore``."""
        super().restore_row(row, snapshot)
        self._some = True
