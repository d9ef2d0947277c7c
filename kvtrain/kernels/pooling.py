"""Windowed weighted running means: how DMC merges a token into the segment before it.

The mean of a segment's last ``window`` tokens (Nawrot et al. 2024, Algorithm 1, with the partial
accumulation of the released code) is

    pooled_t = sum_{s > t - window} w_s (prod_{m=s+1..t} a_m) x_s  /  sum of the same without x_s

with merge decisions ``a`` in [0, 1] and importances ``w``. It is a band matrix with ``window``
diagonals, applied block by block as small dense products; nothing is sequential.
"""

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32

_BLOCK = 64


def pool_segments(inputs: Tensor, merge: Tensor, importance: Tensor, window: int) -> Tensor:
    """Running means of every token's open segment, in at least float32; differentiable in all tensors.

    Args:
        inputs: ``(B, H, T, C)``.
        merge: ``(B, H, T)``, 1 merges a token into the segment before it, 0 starts a new one.
        importance: ``(B, H, T)``, not negative.
        window: Tokens of a segment that count.
    """
    bands = band_weights(at_least_float32(merge), at_least_float32(importance), window)
    return _apply_band(bands, at_least_float32(inputs))


def band_weights(merge: Tensor, importance: Tensor, window: int) -> Tensor:
    """Normalised weights ``(B, H, T, window)``; entry ``r`` belongs to the token ``r`` steps back."""
    chain, columns = torch.ones_like(merge), [importance]
    for back in range(1, window):
        chain = chain * _shift(merge, back - 1)
        columns.append(chain * _shift(importance, back))
    weights = torch.stack(columns, -1)
    # Zero importance everywhere means a slot that does not exist: its mean is 0, not 0 / 0.
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def pool_segments_reference(inputs: Tensor, merge: Tensor, importance: Tensor, window: int) -> Tensor:
    """The definition, token by token; ``pool_segments`` says what the arguments mean."""
    inputs, merge, importance = (at_least_float32(tensor) for tensor in (inputs, merge, importance))
    pooled = []
    for last in range(inputs.shape[2]):
        numerator, denominator = torch.zeros_like(inputs[:, :, 0]), torch.zeros_like(merge[:, :, :1])
        chain = torch.ones_like(merge[:, :, 0])
        for token in range(last, max(-1, last - window), -1):
            weight = (chain * importance[:, :, token]).unsqueeze(-1)
            numerator, denominator = numerator + weight * inputs[:, :, token], denominator + weight
            chain = chain * merge[:, :, token]
        pooled.append(numerator / denominator)
    return torch.stack(pooled, 2)


def _shift(tensor: Tensor, steps: int) -> Tensor:
    """Move ``(B, H, T)`` to later tokens; zeros come in."""
    length = tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (steps, 0))[..., :length] if steps else tensor


def _apply_band(bands: Tensor, inputs: Tensor) -> Tensor:
    """Multiply the band matrix ``(B, H, T, window)`` with ``(B, H, T, C)``, block by block."""
    length, window = bands.shape[2:]
    block = max(min(_BLOCK, length), window)  # so that a band reaches no further back than one block
    blocks = -(-length // block)
    fill = (0, 0, 0, blocks * block - length)
    bands = torch.nn.functional.pad(bands, fill).unflatten(2, (blocks, block))
    inputs = torch.nn.functional.pad(inputs, fill).unflatten(2, (blocks, block))
    before = torch.nn.functional.pad(inputs[:, :, :-1, block - window + 1 :], (0, 0, 0, 0, 1, 0))
    pooled = _dense(bands) @ torch.cat([before, inputs], 3)
    return pooled.flatten(2, 3)[:, :, :length]


def _dense(bands: Tensor) -> Tensor:
    """Lay a block's diagonals ``(..., block, window)`` out as ``(..., block, block + window - 1)``."""
    block, window = bands.shape[-2:]
    wide = torch.nn.functional.pad(bands.flip(-1), (0, block)).flatten(-2)
    dense: Tensor = wide[..., :-block].unflatten(-1, (block, block + window - 1))
    return dense
