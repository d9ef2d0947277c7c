"""DMS as its description says: token by token, plain lists, one row. Shares no code with kvtrain.

Layers of a plain host run as they are, over a row at a time; their attention alone is replaced, by loops over lists of
slots. When token t comes, a head that decides so marks the slot of token t - 1; a marked slot that is more than
``window`` behind t is forgotten; t gets a slot, and attends all that are there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Positions = list[list[list[list[int]]]]  # by layer, by head, behind every token


@dataclass
class Slot:
    """A token's key, rotated, and value: ``(D)``."""

    position: int
    key: Tensor
    value: Tensor
    marked: bool = False


@dataclass(frozen=True)
class Rule:
    """What the oracle needs to know of the settings."""

    window: int
    scale: float
    bias: float
    borrows: bool = False


@torch.no_grad()
def naive_dms(
    host: PreTrainedModel, rule: Rule, ids: Tensor, adapters: list[tuple[Tensor, Tensor, Tensor | None]]
) -> tuple[Tensor, Positions]:
    """Logits ``(T, V)`` of one row ``(T)``, and what every head holds behind every token.

    Args:
        host: A plain host, exact in float64.
        rule: The settings.
        ids: ``(T)``.
        adapters: Of every layer the norm's weight, the projection's and its bias; unread where a channel is borrowed.
    """
    held: Positions = []
    hidden = host.model.embed_tokens(ids)  # (T, hidden)
    angles = host.model.rotary_emb(hidden[None], torch.arange(len(ids))[None])
    for layer, adapter in zip(host.model.layers, adapters, strict=True):
        normed = layer.input_layernorm(hidden)
        output, kept = _attend(layer.self_attn, normed, _read(adapter, hidden, host), rule, angles)
        hidden = hidden + output
        hidden = hidden + _feed(layer.mlp, layer.post_attention_layernorm(hidden))
        held.append(kept)
    return host.lm_head(host.model.norm(hidden)), held


def _feed(mlp: Any, normed: Tensor) -> Tensor:
    """``(T, hidden)`` through a host's feed-forward part, which may give more than its output."""
    fed = mlp(normed[None])
    output: Tensor = fed[0] if isinstance(fed, tuple) else fed
    return output[0]


def _read(adapter: tuple[Tensor, Tensor, Tensor | None], hidden: Tensor, host: PreTrainedModel) -> Tensor:
    """What adapters make of every token, ``(T, H_kv)``."""
    norm, weight, bias = adapter
    squares = (hidden * hidden).mean(-1, keepdim=True)
    read = (norm * hidden / (squares + host.config.rms_norm_eps).sqrt()) @ weight.T
    return read if bias is None else read + bias


def _attend(attention: Any, normed: Tensor, read: Tensor, rule: Rule, angles: Any) -> tuple[Tensor, Any]:
    dim, length = attention.head_dim, len(normed)
    query, key, value = (
        getattr(attention, name)(normed).view(length, -1, dim) for name in ("q_proj", "k_proj", "v_proj")
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (angle[0].repeat(1, dim // angle.shape[-1]) for angle in angles)  # (T, D)
    outputs, kept = [], []
    groups = query.shape[1] // key.shape[1]
    for head in range(key.shape[1]):
        own = query[:, head * groups : (head + 1) * groups].clone()  # (T, G, D)
        if rule.borrows:
            read[:, head] = own[:, 0, -1]
            own[:, 0, -1] = 0
        own = _rotate(own, cos, sin)
        if rule.borrows:
            own[:, 0, -1] = 0
        slots: list[Slot] = []
        heard, behind = [], []
        for token in range(length):
            if token and rule.scale * float(read[token, head]) - rule.bias > 0:
                for slot in slots:
                    slot.marked |= slot.position == token - 1
            slots = [slot for slot in slots if not (slot.marked and token - slot.position > rule.window)]
            rotated = _rotate(key[token : token + 1, head : head + 1], cos[token], sin[token])[0, 0]
            slots.append(Slot(token, rotated, value[token, head]))
            keys, values = torch.stack([s.key for s in slots]), torch.stack([s.value for s in slots])
            scores = own[token] @ keys.T * dim**-0.5  # (G, slots)
            if hasattr(attention, "sinks"):  # one key more, without a value
                scores = torch.cat([scores, attention.sinks[head * groups : (head + 1) * groups, None]], 1)
            heard.append(scores.softmax(-1)[:, : len(slots)] @ values)  # (G, D)
            behind.append([slot.position for slot in slots])
        outputs.append(torch.stack(heard))
        kept.append(behind)
    return attention.o_proj(torch.cat(outputs, 1).flatten(1)), kept


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``(T, H, D)`` by the angles of their tokens."""
    first, second = heads.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return heads * cos.view(-1, 1, heads.shape[-1]) + turned * sin.view(-1, 1, heads.shape[-1])
