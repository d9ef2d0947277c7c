"""Experts as their definition has them: token by token, one expert after the other; gpt-oss has its own."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedConfig

# Of gpt-oss' gate; older configurations do not name them.
ALPHA, LIMIT = 1.702, 7.0


def naive_experts(weights: Mapping[str, Tensor], prefix: str, config: PreTrainedConfig, hidden: Tensor) -> Tensor:
    """Feed ``(..., D)`` forward by the weights whose names begin with ``prefix``; routers decide in float32."""
    if config.model_type == "gpt_oss":
        return _gpt_oss(weights, prefix, config, hidden)
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


def _gpt_oss(weights: Mapping[str, Tensor], prefix: str, config: PreTrainedConfig, hidden: Tensor) -> Tensor:
    """With biases, gates and what is gated in turns and both clamped, and shares of the chosen experts alone."""
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    wide, wide_bias, down, down_bias = (weights[f"{prefix}experts.{name}"] for name in names)
    outputs = []
    for row in hidden.flatten(0, -2):
        logits, experts = (weights[f"{prefix}router.weight"] @ row + weights[f"{prefix}router.bias"]).topk(
            config.num_experts_per_tok
        )
        total = torch.zeros_like(row)
        for share, expert in zip(logits.softmax(0), experts.tolist(), strict=True):
            both = row @ wide[expert] + wide_bias[expert]
            gate = both[0::2].clamp(max=LIMIT)
            gated = both[1::2].clamp(-LIMIT, LIMIT)
            fed = gate * torch.sigmoid(ALPHA * gate) * (gated + 1)
            total = total + share * (fed @ down[expert] + down_bias[expert])
        outputs.append(total)
    return torch.stack(outputs).view_as(hidden)
