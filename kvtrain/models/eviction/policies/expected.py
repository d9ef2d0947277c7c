"""Expected Attention (Devoto et al. 2025, arXiv 2510.00636): what queries to come look at, if they are as before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvtrain.models.eviction.budgets import BudgetedEviction

if TYPE_CHECKING:
    from kvtrain.models.eviction.observation import NewQueries
    from kvtrain.models.eviction.slots import LayerShape, LayerSlots

_SLOTS_AT_A_TIME = 256


@dataclass(frozen=True)
class ExpectedAttention(BudgetedEviction):
    """Keep what a Gaussian of queries gives most probability, times the norm of what it would add to the output.

    The Gaussian is that of a row's queries before rotation, from the token behind the sink on. Rotated by the mean of
    the next positions' rotations, its mean mu and covariance S give a key k the expected logit
    ``k mu + k S k / 2`` (section 3), of which a softmax over the slots behind the sink is taken. Mean and covariance of
    every query head are state of the row: ``head_dim * (head_dim + 1)`` numbers a head, in at least float32.

    The paper evicts once, when a prompt ends, and nothing of what follows; where that is cut as well, the latest tokens
    need protection (``recent``), of which the paper knows none.

    Args:
        num_future: Next positions whose rotations are averaged.
        use_covariance: Whether the covariance counts; without it, ``head_dim`` numbers are kept a query head.
        use_value_norm: Whether probabilities are multiplied by the norm of the slot's value.
        epsilon: Added to probabilities before that, so that large values are not lost for lack of probability.

    Raises:
        ValueError: There is no future, or ``epsilon`` is negative.
    """

    name: ClassVar[str] = "expectedattention"

    recent: int = 128
    sink: int = 4
    num_future: int = 512
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_future < 1:
            raise ValueError(f"num_future must be at least 1 position, not {self.num_future}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon is added to probabilities: 0 or more, not {self.epsilon}")

    def row_state(self, shape: "LayerShape") -> Mapping[str, Any]:
        """See ``Eviction``."""
        heads, channels = shape.num_query_heads, shape.head_dim
        spread = {"query_scatter": ((heads, channels, channels), shape.wide)} if self.use_covariance else {}
        return {"query_count": ((), torch.long), "query_mean": ((heads, channels), shape.wide), **spread}

    def observe_queries(self, layer: "LayerSlots", new: "NewQueries") -> None:
        """See ``Eviction``; moments of what was seen and of what is new are merged (Chan et al. 1983)."""
        counted = new.positions >= self.sink  # (B, n)
        number, before = counted.sum(1), layer.state["query_count"]
        left_out = ~counted[:, None, :, None]
        queries = (new.before_rotation().to(layer.shape.wide) * new.scaling).masked_fill(left_out, 0)
        mean = queries.sum(2) / number.clamp(min=1)[:, None, None]  # (B, H, D)
        share = (number / (before + number).clamp(min=1)).to(mean.dtype)
        shift = mean - layer.state["query_mean"]
        if self.use_covariance:
            apart = (queries - mean.unsqueeze(2)).masked_fill(left_out, 0)
            between = shift.unsqueeze(-1) * shift.unsqueeze(-2) * (before * share)[:, None, None, None]
            layer.state["query_scatter"] = layer.state["query_scatter"] + apart.mT @ apart + between
        layer.state["query_mean"] = layer.state["query_mean"] + shift * share[:, None, None]
        layer.state["query_count"] = before + number

    def scores(self, layer: "LayerSlots") -> Tensor:
        """See ``BudgetedEviction``."""
        live, position = layer.pages.live(), layer.pages.field("position")
        keys, values = layer.read_all("keys"), layer.read_all("values")
        logits = self._expected_logits(layer, keys)  # (B, H_kv, G, K)
        counted = live & (position >= self.sink)
        logits = logits.masked_fill(~counted.unsqueeze(2), torch.finfo(logits.dtype).min)
        probability = logits.softmax(-1).mean(2)
        return (probability + self.epsilon) * values.norm(dim=-1) if self.use_value_norm else probability

    def _expected_logits(self, layer: "LayerSlots", keys: Tensor) -> Tensor:
        """Logarithms of what the row's queries to come are expected to weigh keys ``(B, H_kv, K, D)`` with."""
        from kvtrain.kernels.rope import apply_rotary

        ahead = layer.tokens[:, None] + torch.arange(self.num_future, device=layer.tokens.device)
        cos, sin = (angle.mean(1, keepdim=True) for angle in layer.angles(ahead))  # (B, 1, D)
        groups = (layer.num_heads, -1)
        mean = apply_rotary(layer.state["query_mean"].unsqueeze(2), cos, sin)  # (B, H, 1, D)
        logits: Tensor = mean.flatten(2).unflatten(1, groups) @ keys.mT  # (B, H_kv, G, K)
        if self.use_covariance:
            count = layer.state["query_count"].clamp(min=1)[:, None, None, None]
            cos, sin = (angle.expand(-1, keys.shape[-1], -1) for angle in (cos, sin))
            covariance = layer.state["query_scatter"] / count  # (B, H, D, D)
            for _ in range(2):  # its rows, and then its columns
                covariance = apply_rotary(covariance, cos, sin).mT
            covariance, by_group = covariance.unflatten(1, groups), keys.unsqueeze(2)  # (B, H_kv, 1, K, D)
            runs = by_group.split(_SLOTS_AT_A_TIME, 3)  # every query head makes vectors of them
            logits += torch.cat([((run @ covariance) * run).sum(-1) for run in runs], 3) / 2
        return logits


POLICY = ExpectedAttention
