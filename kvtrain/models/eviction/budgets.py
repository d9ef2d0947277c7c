"""How many slots each head of each layer keeps, and which are above that."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.models.eviction.config import Eviction, check_one_of
from kvtrain.models.method import Repeat

if TYPE_CHECKING:
    from kvtrain.models.eviction.slots import LayerShape, LayerSlots

PerHead = Literal["same", "adaptive"]


@dataclass(frozen=True)
class BudgetedEviction(Eviction):
    """Keep in every key-value head the slots that a policy scores highest.

    Args:
        budget: Slots that a key-value head keeps, ``recent`` and ``sink`` included; a float up to 1 is the share of the
            tokens that its row has seen.
        per_head: The ``"same"`` budget for every head, or an ``"adaptive"`` one: that of a layer goes where scores are
            highest (Ada-KV, Feng et al. 2024, arXiv 2407.11550).
        floor: Share of its equal part that a head keeps in any case where budgets are adaptive.
        per_layer: The ``"same"`` budget for every layer, or one that falls linearly from the lowest layer to the
            highest, a ``"pyramid"`` (PyramidKV, Cai et al. 2024, arXiv 2406.02069).
        beta: Steepness of the pyramid: the highest layer keeps ``1 / beta`` of the mean budget besides ``recent``.

    Raises:
        ValueError: See ``Eviction``.
    """

    layer_budgets: ClassVar[tuple[str, ...]] = ("same", "pyramid")

    budget: int | float = 256
    per_head: PerHead = "same"
    floor: float = 0.2
    per_layer: str = "same"
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = isinstance(self.budget, float)
        if not (0 < self.budget <= 1 if is_share else self.budget >= 1):
            raise ValueError(f"budget is a number of slots from 1 on, or a share up to 1.0, not {self.budget!r}")
        if not is_share and self.recent + self.sink > self.budget:
            raise ValueError(
                f"{self.sink} first and {self.recent} latest tokens do not fit a budget of {self.budget} slots; "
                "raise budget, or lower recent and sink"
            )
        check_one_of("per_head", self.per_head, get_args(PerHead))
        check_one_of("per_layer", self.per_layer, self.layer_budgets)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share of a head's part of the budget, from 0 to 1, not {self.floor}")
        if self.beta < 1:
            raise ValueError(f"beta must be at least 1, not {self.beta}; 1 gives every layer the same budget")

    @abstractmethod
    def scores(self, layer: "LayerSlots") -> Tensor:
        """What every slot is worth, ``(B, H_kv, K)``; the lowest leave. What is not in use may have any score."""

    def evict_mask(self, layer: "LayerSlots") -> Tensor:
        """See ``Eviction``: what is above the budget."""
        return _above_budget(self, layer, self.scores(layer))

    def row_budgets(self, layer: "LayerSlots") -> Tensor:
        """Slots that the heads of a layer may keep in the mean, ``(B,)``."""
        return _row_budgets(self, layer.shape, layer.tokens)

    @property
    def first_eviction(self) -> int:
        """See ``Eviction``: the least budget of a layer."""
        if isinstance(self.budget, float):
            return 0
        return self.budget if self.per_layer == "same" else int(self.recent + (self.budget - self.recent) / self.beta)

    def max_slots(self, shape: "LayerShape") -> int | None:
        """See ``Eviction``."""
        return _max_slots(self, shape)

    def described_slots(self) -> list[str]:
        """See ``Eviction``."""
        return [f"{self.budget:.0%} of the tokens" if isinstance(self.budget, float) else f"{self.budget} slots a head"]

    @property
    def compression(self) -> float:
        """Tokens that share a slot in the mean, where the budget is a share of them."""
        return 1 / self.budget if isinstance(self.budget, float) else 1.0

    def as_served(self, host_config: PreTrainedConfig) -> Eviction:
        """See ``Method.as_served``; heads with budgets of their own have the same ones in the mean."""
        return replace(self, prompt="blocks", per_head="same")

    def repeats(self, host_config: PreTrainedConfig) -> list[Repeat]:
        """See ``Method.repeats``; layers with budgets of their own are all different."""
        return super().repeats(host_config) if self.per_layer == "same" else []


def _max_slots(policy: BudgetedEviction, shape: "LayerShape") -> int | None:
    """The most slots that a head of a layer comes to between two evictions; None where nothing bounds it."""
    if policy.prompt == "dense" or isinstance(policy.budget, float):
        return None
    budget = int(_of_layer(policy, shape, torch.tensor(policy.budget)))
    return budget * (1 if policy.per_head == "same" else shape.num_heads) + policy.every


def _row_budgets(policy: BudgetedEviction, shape: "LayerShape", tokens: Tensor) -> Tensor:
    """Slots that the heads of a layer may keep in the mean, of rows that have seen so many ``tokens (...)``."""
    if isinstance(policy.budget, int):
        mean = torch.full_like(tokens, policy.budget)
    else:
        mean = (policy.budget * tokens.double()).long()
    return _of_layer(policy, shape, mean)


def least_budgets(policy: BudgetedEviction, shape: "LayerShape", tokens: Tensor) -> Tensor:
    """Slots that a head of a layer has left at least, of those that it had; as ``row_budgets``."""
    budgets = _row_budgets(policy, shape, tokens)
    return (policy.floor * budgets).long() if policy.per_head == "adaptive" else budgets


def _of_layer(policy: BudgetedEviction, shape: "LayerShape", mean: Tensor) -> Tensor:
    """Budgets of one layer, from the mean ones over all layers.

    A pyramid is PyramidKV's section 3.2: the highest layer has ``(mean - recent) / beta`` besides the latest tokens,
    the lowest is as far above the mean, and the others lie on the line between them.
    """
    if policy.per_layer != "pyramid" or shape.num_layers == 1:
        return mean
    beside = (mean - policy.recent).double()
    least = beside / policy.beta
    most = 2 * beside - least
    here = most - shape.layer_idx * (most - least) / (shape.num_layers - 1)
    return policy.recent + (here + 0.5).floor().long()


def _above_budget(policy: BudgetedEviction, layer: "LayerSlots", scores: Tensor) -> Tensor:
    """Slots ``(B, H, K)`` with the lowest scores, as many as there are above the budget; none that is protected.

    Args:
        policy: Has the budget.
        layer: Whose slots they are.
        scores: ``(B, H, K)``.
    """
    candidates, budgets = layer.pages.live() & ~layer.protected(), policy.row_budgets(layer)  # (B, H, K), (B,)
    if policy.per_head == "adaptive":
        candidates &= ~_safe(layer, scores, (policy.floor * budgets).long())
        # The heads of a row share what it has.
        surplus = layer.pages.lengths.sum(1) - layer.num_heads * budgets
        return _lowest(scores.flatten(1), candidates.flatten(1), surplus).view_as(candidates)
    return _lowest(scores, candidates, layer.pages.lengths - budgets.unsqueeze(1))


def _lowest(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """The ``count (...)`` lowest candidates among ``scores (..., K)``; all candidates where they are fewer."""
    most = min(int(count.amax()), scores.shape[-1]) if scores.numel() else 0
    if most <= 0:
        return torch.zeros_like(candidates)
    places = scores.masked_fill(~candidates, torch.inf).topk(most, dim=-1, largest=False, sorted=True).indices
    chosen = torch.arange(most, device=scores.device) < count.unsqueeze(-1)
    return torch.zeros_like(candidates).scatter_(-1, places, chosen) & candidates


def _safe(layer: "LayerSlots", scores: Tensor, count: Tensor) -> Tensor:
    """The best slots of every head, ``count (B,)`` of them, those that are protected first."""
    ranked = scores.masked_fill(layer.protected(), torch.inf).masked_fill(~layer.pages.live(), -torch.inf)
    place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < count[:, None, None]
