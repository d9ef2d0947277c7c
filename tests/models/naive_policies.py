"""Eviction policies as their papers define them: one row, token by token, plain lists. Shares no code with kvtrain.

The host runs as it is, one token a pass; its attention alone is replaced, by one over lists of slots. What the policies
do lies in ``naive_scores.py``. A token attends what its heads have kept and itself. When the row has seen a multiple of
``every`` tokens, slots leave; tokens in between therefore see each other, and blocks need no code of their own. While a
prompt is read densely nothing leaves, and at its end slots leave once, whatever ``every`` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from tests.models.naive_scores import Head, Layer, Rule, Slot, evict

_NAME = "kvtrain_tests_naive_policy"
Positions = list[list[list[int]]]  # by layer, by key-value head, ascending


@dataclass(frozen=True)
class Held:
    """What layers and heads hold at a time."""

    kept: Positions
    second: Positions  # MiKV's store of few bits
    merged: list[list[int]]  # D2O: slots that have gone into others so far


@dataclass(frozen=True)
class NaiveRun:
    """Of a whole row: logits ``(T, V)``, and what was held behind each token once slots had left."""

    logits: Tensor
    held: list[Held]
    layers: list[Layer]  # as they end


@torch.no_grad()
def naive_policy(host: PreTrainedModel, rule: Rule, ids: Tensor, prompts: Sequence[range] = ()) -> NaiveRun:
    """Read one row under a policy.

    Args:
        host: A plain host, in evaluation mode.
        rule: The policy and its settings.
        ids: ``(T)``.
        prompts: Which tokens were given rather than decoded; more than one range where a chat has several turns. They
            matter where prompts are dense alone.
    """
    config = host.config
    layers = [
        Layer([Head(layer, head) for head in range(config.num_key_value_heads)])
        for layer in range(config.num_hidden_layers)
    ]
    logits, held = [], []
    usual = config._attn_implementation
    host.set_attn_implementation(_NAME)
    try:
        for position, token in enumerate(ids):
            at = torch.tensor([[position]])
            logits.append(host(token.view(1, 1), position_ids=at, use_cache=False, policy_layers=layers).logits[0, 0])
            if leaves_now(rule, position, prompts):
                evict(rule, layers, next((prompt for prompt in prompts if position == prompt.stop - 1), None))
            held.append(_held(layers))
    finally:
        host.set_attn_implementation(usual)
    return NaiveRun(torch.stack(logits), held, layers)


def leaves_now(rule: Rule, position: int, prompts: Sequence[range]) -> bool:
    """Whether slots leave behind this token."""
    inside = [prompt for prompt in prompts if position in prompt]
    if rule.prompt == "dense" and inside:
        return position == inside[0].stop - 1
    return (position + 1) % rule.every == 0


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    policy_layers: list[Layer],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One token's attention over what its layer keeps, and itself.

    Args:
        module: The host's attention.
        query: Rotated, ``(1, H * G, 1, D)``.
        key: Rotated, ``(1, H, 1, D)``.
        value: ``(1, H, 1, D)``.
        attention_mask: None; everything that is kept is seen.
        scaling: Of the logits.
        policy_layers: What all layers hold.
        kwargs: What other attentions want to know.
    """
    heads, sinks = policy_layers[module.layer_idx].heads, getattr(module, "sinks", None)
    outputs = []
    for head, queries in zip(heads, query[0, :, 0].chunk(len(heads)), strict=True):  # (G, D)
        head.slots.append(Slot(len(head.looks), key[0, head.index, 0], value[0, head.index, 0]))
        head.queries.append(queries)
        attended = head.slots + head.second
        keys, values = (torch.stack([getattr(slot, name) for slot in attended]) for name in ("key", "value"))
        scores = queries @ keys.T * scaling  # (G, slots)
        if sinks is not None:  # one key more, without a value
            scores = torch.cat([scores, sinks.unflatten(0, (len(heads), -1))[head.index].unsqueeze(1)], 1)
        weights = scores.softmax(-1)[:, : len(attended)]
        head.looks.append({slot.position: column for slot, column in zip(attended, weights.T.tolist(), strict=True)})
        outputs.append(weights @ values)
    return torch.cat(outputs)[None, None], None  # (1, 1, H * G, D)


AttentionInterface.register(_NAME, attend)


def _held(layers: list[Layer]) -> Held:
    def positions(name: str) -> Positions:
        return [[sorted(slot.position for slot in getattr(head, name)) for head in layer.heads] for layer in layers]

    return Held(positions("slots"), positions("second"), [[head.merged for head in layer.heads] for layer in layers])
