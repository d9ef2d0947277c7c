"""H2O (Zhang et al. 2023, arXiv 2306.14048): heavy hitters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvtrain.models.eviction.budgets import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.observation import Observation
    from kvtrain.models.eviction.slots import LayerSlots


@dataclass(frozen=True)
class H2O(BudgetedEviction):
    """Keep the latest tokens and those that have got most probability from all queries so far (section 4.1)."""

    name: ClassVar[str] = "h2o"
    slot_fields: ClassVar[Mapping[str, str | None]] = {"mass": None}
    num_observed_queries: ClassVar[int | None] = None

    recent: int = 128

    def observe(self, seen: "Observation") -> None:
        """See ``BudgetedEviction``."""
        seen.add("mass", seen.column_sums())

    def scores(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``."""
        return layer.pages.field("mass")


POLICY = H2O
