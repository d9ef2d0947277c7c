"""Experts as their definition has them: token by token, one expert after the other."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedConfig


def naive_experts(weights: Mapping[str, Tensor], prefix: str, config: PreTrainedConfig, hidden: Tensor) -> Tensor:
    """Feed ``(..., D)`` forward by the weights whose names begin with ``prefix``; routers decide in float32."""
    gate_up, down = weights[f"{prefix}experts.gate_up_proj"], weights[f"{prefix}experts.down_proj"]
    rows, outputs = hidden.flatten(0, -2), []
    probabilities = (rows @ weights[f"{prefix}gate.weight"].T).softmax(-1, torch.float32)
    shares, experts = probabilities.topk(config.num_experts_per_tok)
    if getattr(config, "norm_topk_prob", True):
        shares = shares / shares.sum(-1, keepdim=True)
    for row, row_shares, row_experts in zip(rows, shares.to(rows.dtype), experts.tolist(), strict=True):
        total = torch.zeros_like(row)
        for share, expert in zip(row_shares, row_experts, strict=True):
            gate, up = (gate_up[expert] @ row).chunk(2)
            total = total + share * (down[expert] @ (silu(gate) * up))
        outputs.append(total)
    return torch.stack(outputs).view_as(hidden)
