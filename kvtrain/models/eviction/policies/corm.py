"""CORM (Dai et al. 2024, arXiv 2404.15949): keys that no recent query has found important leave."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from kvtrain.models.eviction.config import Eviction, check_one_of

if TYPE_CHECKING:
    from kvtrain.models.eviction.observation import Observation
    from kvtrain.models.eviction.slots import LayerSlots


@dataclass(frozen=True)
class CORM(Eviction):
    """Keep what any of the latest ``window`` queries has found important, and the latest ``recent`` tokens; no budget.

    A key is important to a query that gives it at least an equal share of its probability (definition 1). Which queries
    those were, a bit for each of the window, comes to one number a slot: the latest of them.

    Args:
        window: Latest queries that are asked.
        threshold: What a share is equal among: the keys that the query attends (``"visible"``), or all tokens up to it
            (``"position"``, the paper's formula, by which ever less is enough as keys leave). At as many slots they
            cost the same: behind 768 tokens of ``kvtrain:tiny``'s text 256 more have perplexity 17.4 with 358 slots
            kept against 17.3 with 429 (windows of 64), 16.91 with 539 against 16.90 with 573 (of 128), 16.88 in full.

    Raises:
        ValueError: The window is empty, or the threshold unknown.
    """

    name: ClassVar[str] = "corm"
    slot_fields: ClassVar[Mapping[str, str | None]] = {"important": "int32"}
    num_observed_queries: ClassVar[int | None] = None

    recent: int = 256
    window: int = 256
    threshold: Literal["visible", "position"] = "visible"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1 query, not {self.window}")
        check_one_of("threshold", self.threshold, ("visible", "position"))

    @property
    def first_eviction(self) -> int:
        """See ``Eviction``: a window of queries comes first."""
        return self.window - 1

    def observe(self, seen: "Observation") -> None:
        """See ``Eviction``; a key-value head's key is important where one of its query heads finds it so."""
        keys = seen.num_visible if self.threshold == "visible" else seen.positions + 1  # (N, c)
        important = (seen.weights * keys[:, None, :, None] >= 1).any(1)  # (N, c, S)
        latest = (important * (seen.positions + 1).unsqueeze(2)).amax(1)  # 0: to none
        seen.maximum("important", latest)

    def evict_mask(self, layer: "LayerSlots") -> Tensor:
        """See ``Eviction``; a token counts as important to its own query."""
        latest = torch.maximum(layer.pages.field("important"), layer.pages.field("position") + 1)
        return (latest <= (layer.tokens - self.window)[:, None, None]) & ~layer.protected()


POLICY = CORM
