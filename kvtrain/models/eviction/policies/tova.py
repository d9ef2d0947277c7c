"""TOVA (Oren et al. 2024, arXiv 2401.06104): what the latest token looks at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvtrain.models.eviction.budgets import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.observation import Observation
    from kvtrain.models.eviction.slots import LayerSlots


@dataclass(frozen=True)
class TOVA(BudgetedEviction):
    """Keep what the latest query gives most probability, in the mean over all heads of a layer, which keep the same.

    Raises:
        ValueError: Heads were to have budgets of their own.
    """

    name: ClassVar[str] = "tova"
    slot_fields: ClassVar[Mapping[str, str | None]] = {"latest": None}
    num_observed_queries: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_head != "same":
            raise ValueError("TOVA's heads keep the same tokens, and have nothing to share: leave per_head at 'same'")

    def observe(self, seen: "Observation") -> None:
        """See ``BudgetedEviction``."""
        seen.put("latest", seen.column_sums(), where=seen.positions[:, -1:] >= 0)

    def scores(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``; all heads have their slots in the same order, since all lose the same ones."""
        return layer.pages.field("latest").sum(1, keepdim=True).expand(-1, layer.num_heads, -1)


POLICY = TOVA
