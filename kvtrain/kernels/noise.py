"""Random numbers that are a function of what they are for: (seed, step, row, layer, head, token).

Keyed noise is the same under another world size, after a resume and in a recomputed layer. A counter
goes through the finaliser of SplitMix64 (Steele et al. 2014); integers wrap, so every device agrees.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15


def _mix(state: Tensor) -> Tensor:
    """Finalise int64 counters, element by element."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        state = (state ^ _shift_right(state, shift)) * multiplier
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def keyed_uniform(
    row_ids: Tensor, seed: int, step: int, layer: int, shape: tuple[int, int], heads: slice = slice(None)
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float32 ``(B, *shape)``, or those of some heads alone.

    Args:
        row_ids: ``(B,)`` identity of each row in the data.
        seed: Of the run.
        step: Optimizer step.
        layer: Layer index.
        shape: Heads and tokens.
        heads: Those that are wanted.
    """
    state = row_ids.long()
    for word in torch.tensor([seed, step, layer], device=row_ids.device):
        state = _mix(state + (word + 1) * _GOLDEN)
    counters = torch.arange(shape[0] * shape[1], device=row_ids.device).view(shape)[heads]
    bits = _mix(state[:, None, None] + (counters + 1) * _GOLDEN)
    # 23 bits and half a step: every value is exact in float32 and neither 0 nor 1.
    return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23


def keyed_logistic(
    row_ids: Tensor, seed: int, step: int, layer: int, shape: tuple[int, int], heads: slice = slice(None)
) -> Tensor:
    """Logistic noise, the difference of two Gumbel variables; arguments as in ``keyed_uniform``."""
    return torch.logit(keyed_uniform(row_ids, seed, step, layer, shape, heads))
