"""D2O (Wan et al. 2024, arXiv 2406.13035): what leaves is merged into what stays, and peaky layers get less room."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.models.eviction.config import Eviction
from kvtrain.models.eviction.policies.h2o import H2O

if TYPE_CHECKING:
    from kvtrain.models.eviction.slots import LayerShape, LayerSlots

_ALL_SLOTS = 1 << 40  # slots, more than a row has
_MOST_SHARED = 100  # of the mean budget, a layer has one part of so many in any case


@dataclass(frozen=True)
class D2O(H2O):
    """H2O whose victims are merged into the slot with the most similar key, if they are similar enough.

    A victim's likeness is the largest cosine of its key, rotated, with one that stays. It is merged where its likeness,
    in the mean over heads, reaches the moving mean of what was seen so far (section 3.3); a slot and what is merged
    into it, each victim times its likeness, are averaged.

    ``per_layer="variance"`` divides the budget over layers when a row's first prompt ends (section 3.2): the more the
    probability that tokens have got differs, the less a layer keeps. The lowest two layers and the highest keep all.

    Args:
        smooth: Weight of the old threshold in the moving mean.

    Raises:
        ValueError: ``smooth`` is no share, or there is no end of a prompt to divide a budget at.
    """

    name: ClassVar[str] = "d2o"
    layer_budgets: ClassVar[tuple[str, ...]] = ("same", "pyramid", "variance")

    sink: int = 4
    smooth: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth is a weight from 0 to 1, not {self.smooth}")
        if self.per_layer == "variance" and self.prompt != "dense":
            raise ValueError("per_layer='variance' divides the budget when a prompt ends: give it prompt='dense'")

    def as_served(self, host_config: PreTrainedConfig) -> Eviction:
        """See ``Method.as_served``; what the text makes of budgets is not known, and some layers keep everything."""
        return self if self.per_layer == "variance" else super().as_served(host_config)

    def row_state(self, shape: "LayerShape") -> Mapping[str, Any]:
        """See ``Eviction``."""
        budget = {"budget": ((), torch.long)} if self.per_layer == "variance" else {}
        return {"threshold": ((), shape.wide), "has_merged": ((), torch.bool), **budget}

    @property
    def first_eviction(self) -> int:
        """See ``Eviction``."""
        return self.sink + self.recent if self.per_layer == "variance" else super().first_eviction

    def row_budgets(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``; rows without a prompt have the mean one."""
        mean = super().row_budgets(layer)
        if self.per_layer != "variance":
            return mean
        if layer.shape.layer_idx in (0, 1, layer.shape.num_layers - 1):
            return torch.full_like(mean, _ALL_SLOTS)
        own = layer.state["budget"]
        return torch.where(own > 0, own, mean)

    def on_prompt_end(self, rows: Tensor, layers: "list[LayerSlots]") -> None:
        """See ``Eviction``."""
        if self.per_layer != "variance":
            return
        spread = torch.stack([_spread(self.scores(layer), layer.pages.live()).to(rows.device) for layer in layers])
        shares = torch.softmax(-spread, 0) * len(layers)  # (layers, B)
        for index, layer in enumerate(layers):
            own, mean = layer.state["budget"], super().row_budgets(layer)
            least = (mean / _MOST_SHARED).ceil().clamp(min=max(1, self.sink + self.recent))
            wanted = torch.maximum((shares[index].to(own.device) * mean).round(), least)
            wanted = torch.minimum(wanted.long(), layer.tokens)
            layer.state["budget"] = torch.where(rows.to(own.device) & (own == 0), wanted, own)

    def on_evict(self, layer: "LayerSlots", victims: Tensor) -> None:
        """See ``Eviction``."""
        slots, real = layer.listed(victims)  # (B, H, E)
        stays = layer.pages.live() & ~victims
        real = real & stays.any(-1, keepdim=True)
        if not slots.shape[2]:
            return
        places = torch.arange(stays.shape[2], device=stays.device).expand(stays.shape)
        kept = {name: layer.read_all(name) for name in layer.pages.dims}
        index = slots.unsqueeze(-1).expand(-1, -1, -1, layer.shape.head_dim)
        unit = torch.nn.functional.normalize(kept["keys"], dim=-1)
        alike = (unit.gather(2, index) @ unit.mT).masked_fill(~stays.unsqueeze(2), -torch.inf)  # (B, H, E, K)
        likeness, nearest = alike.max(-1)
        likeness = likeness.masked_fill(~real, 0.0)
        by_place, count = likeness.sum(1), real.sum(1)  # (B, E): of the first victims of all heads, of the second, ...
        threshold = self._threshold(layer, by_place.sum(1), count.sum(1))
        merges = real & (by_place / count.clamp(min=1) >= threshold[:, None]).unsqueeze(1)
        parts = torch.ones_like(kept["keys"][..., 0]).scatter_add(2, nearest, merges.to(likeness.dtype))
        weight, into = (likeness * merges).unsqueeze(-1), nearest.unsqueeze(-1).expand_as(index)
        merged = {
            name: states.scatter_add(2, into, states.gather(2, index) * weight) / parts.unsqueeze(-1)
            for name, states in kept.items()
        }
        layer.pages.write(merged, places, stays & (parts > 1))

    def _threshold(self, layer: "LayerSlots", likeness: Tensor, count: Tensor) -> Tensor:
        """The moving mean of likenesses, ``(B,)``, these included: their sum and number; rows without keep theirs."""
        old, begun, some = layer.state["threshold"], layer.state["has_merged"], count > 0
        mean = likeness / count.clamp(min=1)
        new = torch.where(begun, self.smooth * old + (1 - self.smooth) * mean, mean)
        layer.state["threshold"] = torch.where(some, new, old)
        layer.state["has_merged"] = begun | some
        return layer.state["threshold"]


def _spread(scores: Tensor, live: Tensor) -> Tensor:
    """How much scores ``(B, H, K)`` differ, ``(B,)``: variances by head, scaled to [0, 1] over heads, in the mean."""
    count = live.sum(-1).clamp(min=1)
    mean = scores.masked_fill(~live, 0).sum(-1) / count
    variance = (scores - mean.unsqueeze(-1)).square().masked_fill(~live, 0).sum(-1) / count  # (B, H)
    low, high = variance.aminmax(dim=1, keepdim=True)
    return ((variance - low) / (high - low).masked_fill(high == low, 1)).mean(1)


POLICY = D2O
