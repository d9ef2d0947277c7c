"""Random eviction: the control that any policy must beat."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvtrain.models.eviction.budgets import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.slots import LayerSlots


@dataclass(frozen=True)
class RandomEviction(BudgetedEviction):
    """Keep tokens by lot, every head by its own.

    A token's lot depends on the seed, its layer, its head and its position alone, so that a text loses the same tokens
    however it is sent.

    Args:
        seed: Of the lots.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def scores(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``."""
        head = torch.arange(layer.num_heads, device=layer.tokens.device)[:, None]
        lots = layer.pages.field("position").long() + _mixed(head + (layer.shape.layer_idx << 16) + (self.seed << 32))
        return (_mixed(lots) & 0xFFFFFFFF).double()


def _mixed(numbers: Tensor) -> Tensor:
    """Integers whose every bit depends on all bits of the given ones; products wrap around."""
    for factor in (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51):
        numbers = (numbers ^ (numbers >> 29)) * factor
    return numbers ^ (numbers >> 32)


POLICY = RandomEviction
