"""MiKV (Yang et al. 2024, arXiv 2402.18096): what an eviction policy would drop stays, in fewer bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from kvtrain.models.eviction.policies.h2o import H2O
from kvtrain.models.hosts import key_value_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from kvtrain.cache.paged import PagedStore
    from kvtrain.cache.rows import Placement
    from kvtrain.models.eviction.observation import NewQueries
    from kvtrain.models.eviction.secondary import SecondaryStore
    from kvtrain.models.eviction.slots import LayerShape, LayerSlots


@dataclass(frozen=True)
class MiKV(H2O):
    """Keep H2O's choice as it is and all other tokens in ``low_bits``; nothing is forgotten, and nothing comes back.

    Args:
        low_bits: Bits of a channel of what leaves the budget: 8, 4 or 2.
        group: Channels that share a scale in these bits, a divisor of ``head_dim``, of which the paper takes the half
            with 2 bits; each scale costs 4 bytes, zero included. None: all share one.
        balance: Multiply keys that leave by ``sqrt(max |q| / max |k|)`` before they are rounded, and queries that look
            at them by its inverse (section 3.3), so that a channel in which keys are large does not take the precision
            of all others. The maxima are over a row's first prompt, by channel and key-value head.

    Raises:
        ValueError: Other bits than there are, an empty group, or there is no end of a prompt to balance at.
    """

    name: ClassVar[str] = "mikv"

    low_bits: Literal[2, 4, 8] = 4
    group: int | None = None
    balance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_bits not in (2, 4, 8):
            raise ValueError(f"low_bits must be 8, 4 or 2, not {self.low_bits!r}; a larger budget keeps more as it is")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1 channel, not {self.group}; None gives a vector one scale")
        if self.balance and self.prompt != "dense":
            raise ValueError("balance=True looks at a prompt before anything leaves: give it prompt='dense'")

    def validate(self, host_config: "PreTrainedConfig") -> None:
        """See ``Method.validate``; vectors must come out in whole bytes and whole groups."""
        from kvtrain.kernels.quantization import packed_width

        super().validate(host_config)
        for _, head_dim in key_value_shapes(host_config):
            packed_width(head_dim, self.low_bits, self.group)

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

        return SecondaryStore(self, shape, placement, primary, self.low_bits, self.group)

    def row_state(self, shape: "LayerShape") -> Mapping[str, Any]:
        """See ``Eviction``; a balancer of 0 has not been set."""
        channels = ((shape.num_heads, shape.head_dim), shape.wide)
        return {"largest_query": channels, "balancer": channels} if self.balance else {}

    def observe_queries(self, layer: "LayerSlots", new: "NewQueries") -> None:
        """See ``Eviction``."""
        if not self.balance:
            return
        sizes = new.rotated.abs().masked_fill((new.positions < 0)[:, None, :, None], 0)
        largest = sizes.unflatten(1, (layer.num_heads, -1)).amax((2, 3))  # (B, H_kv, D)
        layer.state["largest_query"] = layer.state["largest_query"].maximum(largest)

    def on_prompt_end(self, rows: Tensor, layers: "list[LayerSlots]") -> None:
        """See ``Eviction``; a row that has answered before its first prompt, and let something go, has no balancer."""
        if not self.balance:
            return
        for layer in layers:
            assert layer.secondary is not None
            live, own, query = layer.pages.live(), layer.state["balancer"], layer.state["largest_query"]
            sizes = layer.read_all("keys").abs().masked_fill(~live.unsqueeze(-1), 0)
            key = sizes.amax(2)  # (B, H_kv, D)
            balancer = (query / key).sqrt().where((query > 0) & (key > 0), 1.0)
            unset = (own == 0).all(-1).all(-1) & (layer.secondary.lengths == 0).all(-1)
            chosen = rows.to(own.device) & unset
            layer.state["balancer"] = balancer.where(chosen[:, None, None], own)

    def secondary_query(self, layer: "LayerSlots", query: Tensor) -> Tensor:
        """See ``Eviction``."""
        if not self.balance:
            return query
        by_head = query.unflatten(1, (layer.num_heads, -1))  # (B, H_kv, G, n, D)
        scaled: Tensor = (by_head / _balancer(layer)[:, :, None, None]).flatten(1, 2)
        return scaled.to(query.dtype)

    def on_evict(self, layer: "LayerSlots", victims: Tensor) -> None:
        """See ``Eviction``."""
        store, (slots, real) = layer.secondary, layer.listed(victims)
        assert store is not None
        entries = {name: layer.read_slots(name, slots) for name in store.dims}
        if self.balance:
            entries["keys"] = entries["keys"] * _balancer(layer).unsqueeze(2)
        store.write(entries, store.lengths.unsqueeze(-1) + real.cumsum(-1) - 1, real)


def _balancer(layer: "LayerSlots") -> Tensor:
    """What keys of the second store are multiplied by, ``(B, H_kv, D)``; 1 where nothing has been set."""
    own = layer.state["balancer"]
    return own.where(own > 0, 1.0)


POLICY = MiKV
