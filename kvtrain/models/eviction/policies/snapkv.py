"""SnapKV (Li et al. 2024, arXiv 2404.14469): what the latest queries look at, and its neighbours."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvtrain.models.eviction.budgets import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.slots import LayerSlots


@dataclass(frozen=True)
class SnapKV(BudgetedEviction):
    """Keep what the latest ``recent`` queries give most probability, pooled over neighbours in the text (section 4.2).

    ``per_layer="pyramid"`` makes it PyramidKV, ``per_head="adaptive"`` Ada-KV.

    Args:
        kernel: Neighbours that are averaged, an odd number; 1 pools nothing.

    Raises:
        ValueError: ``kernel`` is even, or there is no window.
    """

    name: ClassVar[str] = "snapkv"

    recent: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is an odd number of neighbours, not {self.kernel}; 1 pools nothing")
        if self.recent < 1:
            raise ValueError("recent is the window whose queries are asked: at least 1 token, not 0")

    def query_window(self) -> int:
        """See ``BudgetedEviction``."""
        return self.recent

    def scores(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``; neighbours are those in the text, wherever their slots are."""
        sums, position = layer.window_sums(), layer.pages.field("position")
        candidates = layer.pages.live() & (position < (layer.tokens - self.recent)[:, None, None])
        order = position.masked_fill(~candidates, torch.iinfo(position.dtype).max).argsort(dim=-1)
        in_order = sums.masked_fill(~candidates, 0).gather(-1, order)
        pooled = torch.nn.functional.avg_pool1d(in_order, self.kernel, 1, self.kernel // 2)
        return torch.zeros_like(sums).scatter(-1, order, pooled)


POLICY = SnapKV
