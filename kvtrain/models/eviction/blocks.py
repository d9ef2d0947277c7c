"""How a chunk goes through a layer whose rows evict at multiples of a number of tokens: in blocks that end there."""

from typing import NamedTuple

from torch import Tensor

from kvtrain.models.context import ForwardContext
from kvtrain.models.eviction.config import Policy
from kvtrain.models.ordering import block_columns


class Block(NamedTuple):
    """New tokens that attend what was kept before them, and each other.

    Attributes:
        columns: ``(B, W)`` where in the chunk they stand, the padding of a row first; None: they are all of it.
        valid: ``(B, W)`` which of them are real.
        positions: ``(B, W)`` in their rows, -1 for padding.
        evicting: ``(B,)`` rows that evict behind them; None: none does.
    """

    columns: Tensor | None
    valid: Tensor
    positions: Tensor
    evicting: Tensor | None


def blocks_of(policy: Policy, context: ForwardContext) -> list[Block]:
    """The blocks of a pass, which are the same for every layer.

    Rows of which a prompt is read densely evict when it has ended, and not here.
    """
    key = "blocks", policy.every, policy.prompt, policy.first_eviction
    return context.keep(key, lambda: _make(policy, context))


def _make(policy: Policy, context: ForwardContext) -> list[Block]:
    assert context.cache is not None and context.valid is not None and context.prefill is not None
    valid, past = context.valid, context.cache.tokens.to(context.valid.device)
    positions = (past[:, None] + valid.cumsum(1) - 1).masked_fill(~valid, -1)
    after, before = past + valid.sum(1), policy.first_eviction // policy.every
    ends = _evicting(policy, after, valid)
    if policy.prompt == "dense" or valid.shape[1] == 1:
        if policy.prompt == "dense" and not context.decodes:
            ends &= ~context.prefill
        return [Block(None, valid, positions, ends if bool(ends.any()) else None)]
    # Blocks that end before anything can leave are one.
    number = (positions // policy.every - before).clamp(min=0)
    number = (number - (past // policy.every - before).clamp(min=0)[:, None]).masked_fill(~valid, -1)
    blocks = []
    for step in range(int(number.max()) + 1):
        columns, inside = block_columns(number == step)
        at = positions.gather(1, columns).masked_fill(~inside, -1)
        evicting = _evicting(policy, at.amax(1) + 1, inside)
        blocks.append(Block(columns, inside, at, evicting if bool(evicting.any()) else None))
    return blocks


def _evicting(policy: Policy, tokens: Tensor, valid: Tensor) -> Tensor:
    """Rows ``(B,)`` that evict when they have seen so many tokens ``(B,)``, of which new ones ``(B, W)`` are real."""
    return valid.any(1) & (tokens % policy.every == 0) & (tokens > policy.first_eviction)
