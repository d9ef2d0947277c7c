"""One token that stands for all that a window has dropped (RazorAttention, arXiv 2407.15891, section 3.3).

Its key and its value are the means of theirs, and its score is raised by the logarithm of their number: what counts
so is what full attention gives where all dropped keys are equal.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.kernels.attention import merge_attention
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.documents import Documents


class Dropped(NamedTuple):
    """What each query no longer sees, summed up.

    Attributes:
        keys: ``(B, H_kv, T, D)`` sums, in at least float32.
        values: ``(B, H_kv, T, D_v)`` likewise.
        number: ``(B or 1, T)`` of tokens in them.
    """

    keys: Tensor
    values: Tensor
    number: Tensor


def dropped_by_window(
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    sink: int = 0,
    position_ids: Tensor | None = None,
    documents: Documents | None = None,
) -> Dropped:
    """Running sums over the tokens that a window with sinks hides from each token of a sequence.

    Args:
        key: ``(B, H_kv, T, D)``.
        value: ``(B, H_kv, T, D_v)``.
        window: Latest tokens that are seen, the token's own included.
        sink: First tokens of each document that are seen as well.
        position_ids: ``(B or 1, T)`` within the documents; needed where there are documents.
        documents: Of the tokens, each a run of its row; None: every row is one document.

    Raises:
        ValueError: Documents without positions.
    """
    index = torch.arange(key.shape[2], device=key.device)[None]
    if documents is None:
        last = max(sink, key.shape[2] - window)
        keys, values = (_behind(at_least_float32(states[:, :, sink:last]).cumsum(2), states) for states in (key, value))
        return Dropped(keys, values, (index - (window + sink) + 1).clamp(min=0))
    if position_ids is None:
        raise ValueError("rows of several documents need position_ids: their first tokens stay visible")
    name = ("dropped", position_ids, window + sink)
    drops, before = documents.keep(name, lambda: _dropping(position_ids.expand_as(documents.keys), window + sink))
    last = max(0, key.shape[2] - window)
    keys, values = (_sums_since(before, _behind(states[:, :, :last], states), drops) for states in (key, value))
    return Dropped(keys, values, index - before)


def add_compensation(
    part: tuple[Tensor, Tensor], query: Tensor, dropped: Dropped, scale: float
) -> tuple[Tensor, Tensor]:
    """Let every query see the token that stands for what it no longer sees, besides what it does see.

    Args:
        part: Output ``(B, H, T, D_v)`` and log-sum-exp ``(B, H, T)`` of its attention to the latter.
        query: ``(B, H, T, D)``.
        dropped: The former.
        scale: Factor on the scores.

    Returns:
        Such a pair.
    """
    wide = at_least_float32(query).unflatten(1, (dropped.keys.shape[1], -1))  # (B, H_kv, G, T, D)
    number = dropped.number.clamp(min=1)[:, None].to(wide.dtype)
    keys, values = ((sums.to(wide.dtype) / number.unsqueeze(-1)).unsqueeze(2) for sums in dropped[:2])
    score = (wide * keys).sum(-1) * scale + number.log().unsqueeze(1)
    score = score.masked_fill((dropped.number == 0)[:, None, None], float("-inf"))
    values = values.expand(-1, -1, wide.shape[2], -1, -1)
    return merge_attention([part, (values.flatten(1, 2), score.flatten(1, 2))])


def _dropping(position_ids: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, T)`` that see one less than there are, and for each the latest one that does not."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)[None]
    drops = position_ids >= seen  # the token a window back leaves as this one enters
    return drops, torch.where(drops, 0, index).cummax(1).values


def _behind(states: Tensor, like: Tensor) -> Tensor:
    """States with zeros before them, until they are as many as the others."""
    return pad(states, (0, 0, like.shape[2] - states.shape[2], 0))


def _sums_since(before: Tensor, states: Tensor, counted: Tensor) -> Tensor:
    """Sums over those of ``states (B, H, T, D)`` that are counted, from behind ``before (B, T)`` up to each token.

    They are differences of sums over the row, which therefore are float64: a short document may stand at its end.
    """
    total = torch.where(counted[:, None, :, None], states, 0).double().cumsum(2)
    index = before[:, None, :, None].expand_as(total)
    return (total - total.gather(2, index)).to(torch.promote_types(states.dtype, torch.float32))
