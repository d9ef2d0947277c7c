"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): attention sinks and a window."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvtrain.models.eviction.config import BudgetedEviction

if TYPE_CHECKING:
    from torch import Tensor

    from kvtrain.models.eviction.cache import EvictingCacheLayer


@dataclass(frozen=True)
class StreamingLLM(BudgetedEviction):
    """Keep the first tokens and the latest, which score by their position; keys stay rotated as they were."""

    name: ClassVar[str] = "streamingllm"

    sink: int = 4

    def scores(self, layer: "EvictingCacheLayer") -> "Tensor":
        """See ``BudgetedEviction``."""
        return layer.pages.field("position").double()


POLICY = StreamingLLM
