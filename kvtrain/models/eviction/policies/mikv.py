"""MiKV (Yang et al. 2024, arXiv 2402.18096): what an eviction policy would drop stays, in fewer bits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvtrain.models.eviction.policies.h2o import H2O
from kvtrain.models.method import check_kv_bits

if TYPE_CHECKING:
    from torch import Tensor

    from kvtrain.cache.paged import PagedStore
    from kvtrain.cache.rows import Placement
    from kvtrain.models.eviction.cache import EvictingCacheLayer, LayerShape
    from kvtrain.models.eviction.secondary import SecondaryStore


@dataclass(frozen=True)
class MiKV(H2O):
    """Keep H2O's choice as it is and all other tokens in ``low_bits``; nothing is forgotten, and nothing comes back.

    Args:
        low_bits: Bits of a channel of what leaves the budget.

    Raises:
        ValueError: Other bits than there are.
    """

    name: ClassVar[str] = "mikv"

    low_bits: Literal[4, 8] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kv_bits(self.low_bits)

    def described_slots(self) -> list[str]:
        """See ``Eviction``."""
        return [*super().described_slots(), f"all others in {self.low_bits} bits"]

    @property
    def compression(self) -> float:
        """See ``BudgetedEviction``; every token has a slot."""
        return 1.0

    def secondary_store(self, shape: "LayerShape", placement: "Placement", primary: "PagedStore") -> "SecondaryStore":
        """See ``Eviction``."""
        from kvtrain.models.eviction.secondary import SecondaryStore

        return SecondaryStore(self, shape, placement, primary, self.low_bits)

    def on_evict(self, layer: "EvictingCacheLayer", victims: "Tensor") -> None:
        """See ``Eviction``."""
        store, (slots, real) = layer.secondary, layer.listed(victims)
        assert store is not None
        entries = {name: layer.read_slots(name, slots) for name in store.dims}
        store.write(entries, store.lengths.unsqueeze(-1) + real.cumsum(-1) - 1, real)


POLICY = MiKV
