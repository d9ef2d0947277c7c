"""Where families of hosts differ by their equations, for references that share no code with kvtrain."""

from typing import Any

import torch
from torch import Tensor

GEMMA = "gemma3_text"


def embed(config: Any, weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of the word embedding ``(V, hidden)``; Gemma's are larger."""
    return weight[ids] * (config.hidden_size**0.5 if config.model_type == GEMMA else 1)


def norm(config: Any, weight: Tensor, states: Tensor) -> Tensor:
    """Over the last axis; Gemma's weights are around zero."""
    factor = 1 + weight if config.model_type == GEMMA else weight
    return factor * states / (states.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def activate(config: Any, gate: Tensor) -> Tensor:
    """SiLU, or GELU by tanh."""
    if config.model_type != GEMMA:
        return gate / (1 + (-gate).exp())
    return gate / 2 * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh())


def score_scale(config: Any) -> float:
    """On products of queries and keys."""
    return float(config.query_pre_attn_scalar if config.model_type == GEMMA else config.head_dim) ** -0.5


def rotary_base(config: Any, layer: int) -> float:
    """Of a layer whose frequencies are powers of it."""
    rope = config.rope_parameters
    rope = rope[config.layer_types[layer]] if config.model_type == GEMMA else rope
    return float(rope["rope_theta"])
