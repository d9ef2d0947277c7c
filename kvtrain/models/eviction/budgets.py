"""How many slots each head of each layer keeps, and which are above that."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtrain.models.eviction.config import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.cache import EvictingCacheLayer, LayerShape


def max_slots(policy: BudgetedEviction, shape: "LayerShape") -> int | None:
    """The most slots that a head of a layer comes to between two evictions; None where nothing bounds it."""
    if policy.prompt == "dense" or isinstance(policy.budget, float):
        return None
    budget = int(_of_layer(policy, shape, torch.tensor(policy.budget)))
    return budget * (1 if policy.per_head == "same" else shape.num_heads) + policy.every


def row_budgets(policy: BudgetedEviction, shape: "LayerShape", tokens: Tensor) -> Tensor:
    """Slots that the heads of a layer may keep in the mean, of rows that have seen so many ``tokens (...)``."""
    if isinstance(policy.budget, int):
        mean = torch.full_like(tokens, policy.budget)
    else:
        mean = (policy.budget * tokens.double()).long()
    return _of_layer(policy, shape, mean)


def least_budgets(policy: BudgetedEviction, shape: "LayerShape", tokens: Tensor) -> Tensor:
    """Slots that a head of a layer has left at least, of those that it had; as ``row_budgets``."""
    budgets = row_budgets(policy, shape, tokens)
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


def above_budget(policy: BudgetedEviction, layer: "EvictingCacheLayer", scores: Tensor) -> Tensor:
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


def _safe(layer: "EvictingCacheLayer", scores: Tensor, count: Tensor) -> Tensor:
    """The best slots of every head, ``count (B,)`` of them, those that are protected first."""
    ranked = scores.masked_fill(layer.protected(), torch.inf).masked_fill(~layer.pages.live(), -torch.inf)
    place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < count[:, None, None]
