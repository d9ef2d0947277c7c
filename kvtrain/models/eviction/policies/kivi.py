"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys by channel and values by token in few bits, nothing beside them."""

from dataclasses import dataclass
from typing import ClassVar

from kvtrain.models.eviction.policies.gear import GEAR


@dataclass(frozen=True)
class KIVI(GEAR):
    """``GEAR`` without outliers and low rank; the groups of a channel are the blocks, those of a token its head.

    Args:
        bits: See ``GEAR``.
        block: See ``GEAR``.
        outliers: See ``GEAR``.
        rank: See ``GEAR``.
        prompt: See ``GEAR``.
        page_size: See ``GEAR``.

    Raises:
        ValueError: See ``GEAR``.
    """

    name: ClassVar[str] = "kivi"

    outliers: float = 0.0
    rank: int = 0


POLICY = KIVI
