"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): attention sinks and a window."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvtrain.models.eviction.budgets import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.slots import LayerSlots


@dataclass(frozen=True)
class StreamingLLM(BudgetedEviction):
    """Keep the first tokens and the latest, which score by their position; keys stay rotated as they were."""

    name: ClassVar[str] = "streamingllm"

    sink: int = 4

    def scores(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``."""
        return layer.pages.field("position").double()


POLICY = StreamingLLM
