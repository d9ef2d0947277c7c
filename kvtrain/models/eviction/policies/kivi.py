"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys by channel and values by token in few bits, nothing beside them."""

from dataclasses import dataclass
from typing import ClassVar

from kvtrain.models.eviction.policies.gear import GEAR


@dataclass(frozen=True)
class KIVI(GEAR):
    """``GEAR`` without outliers and low rank; the groups of a channel are the blocks, those of a token its head.

    Args:
        bits: Of a channel: 8, 4 or 2.
        block: Tokens of a block, and of a group of a key's channel.
        outliers: 0, or ``GEAR``'s.
        rank: 0, or ``GEAR``'s.
        prompt: ``"dense"``: a prompt is packed when it ends; ``"blocks"``: its blocks as they are complete.
        page_size: Slots in a page of tokens that are not packed yet.

    Raises:
        ValueError: See ``GEAR``.
    """

    name: ClassVar[str] = "kivi"

    outliers: float = 0.0
    rank: int = 0


POLICY = KIVI
