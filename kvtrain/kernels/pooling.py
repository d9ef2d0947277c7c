"""Windowed weighted running means: how DMC merges a token into the segment before it.

The mean of a segment's last ``window`` tokens (Nawrot et al. 2024, Algorithm 1, with the partial
accumulation of the released code) is

    pooled_t = sum_{s > t - window} w_s (prod_{m=s+1..t} a_m) x_s  /  sum of the same without x_s

with merge decisions ``a`` in [0, 1] and importances ``w``. It is a band matrix with ``window``
diagonals, applied block by block as small dense products; nothing is sequential.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.dispatch import at_least_float32, autocast_off

_BLOCK = 32


def pool_segments(inputs: Tensor, merge: Tensor, importance: Tensor, window: int) -> Tensor:
    """Running means of every token's open segment, in at least float32; differentiable in all tensors.

    Args:
        inputs: ``(B, H, T, C)``.
        merge: ``(B, H, T)``, 1 merges a token into the segment before it, 0 starts a new one.
        importance: ``(B, H, T)``, not negative.
        window: Tokens of a segment that count.
    """
    with autocast_off(inputs):
        bands = _BandWeights.apply(at_least_float32(merge), at_least_float32(importance), window)  # type: ignore[no-untyped-call]
        pooled: Tensor = _BandProduct.apply(bands, inputs)  # type: ignore[no-untyped-call]
    return pooled


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


class _BandWeights(torch.autograd.Function):
    """Normalised weights ``(B, H, T, window)`` of the latest tokens, the oldest first and the token itself last."""

    @staticmethod
    def forward(ctx: Any, merge: Tensor, importance: Tensor, window: int) -> Tensor:
        weights = _chains(_windows(merge, window)) * _windows(importance, window)
        # Zero importance everywhere means a slot that does not exist: its mean is 0, not 0 / 0.
        total = weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
        bands = (weights / total).movedim(0, -1).contiguous()
        ctx.save_for_backward(merge, importance, bands, total)
        return bands

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        merge, importance, bands, total = ctx.saved_tensors
        grad, bands = (tensor.movedim(-1, 0).contiguous() for tensor in (grad, bands))
        grad_weights = (grad - (grad * bands).sum(0)) / total
        ties = _windows(merge, len(bands))
        chains = _chains(ties)
        grad_chains = grad_weights * _windows(importance, len(bands))
        for later in range(1, len(bands)):  # a chain is part of the one that reaches a token further back
            grad_chains[later].addcmul_(grad_chains[later - 1], ties[later])
        grad_ties = torch.cat([torch.zeros_like(chains[:1]), grad_chains[:-1] * chains[1:]])
        return _sum_windows(grad_ties), _sum_windows(grad_weights * chains), None


def _chains(ties: Tensor) -> Tensor:
    """Products ``(window, B, H, T)`` of the decisions that tie a token to those before it, the furthest first.

    Args:
        ties: The decisions, as ``_windows`` shows them.
    """
    chains = ties.new_empty(ties.shape)
    chains[-1] = 1
    for back in range(len(ties) - 2, -1, -1):
        torch.mul(chains[back + 1], ties[back + 1], out=chains[back])
    return chains


def _windows(tensor: Tensor, window: int) -> Tensor:
    """A view ``(window, B, H, T)`` of what each of the latest tokens has in ``(B, H, T)``; 0 before the first."""
    padded = torch.nn.functional.pad(tensor, (window - 1, 0))
    return padded.unfold(-1, tensor.shape[-1], 1).movedim(2, 0)


def _sum_windows(windows: Tensor) -> Tensor:
    """Add up what ``_windows`` shows of each token: ``(B, H, T)``."""
    length = windows.shape[-1]
    total = windows.new_zeros(*windows.shape[1:-1], length + len(windows) - 1)
    for start, part in enumerate(windows):
        total[..., start : start + length] += part
    return total[..., len(windows) - 1 :]


class _BandProduct(torch.autograd.Function):
    """The band matrix ``(B, H, T, window)`` times ``(B, H, T, C)``; keeps its two factors and nothing else."""

    @staticmethod
    def forward(ctx: Any, bands: Tensor, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(bands, inputs)
        layout = _Layout(bands)
        line = layout.blocks(inputs)
        pooled = torch.empty_like(line)
        torch.bmm(layout.dense(bands), layout.reach(line), out=pooled[:-1])
        return layout.tokens(pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        bands, inputs = ctx.saved_tensors
        layout = _Layout(bands)
        with autocast_off(grad):
            grad_blocks = layout.blocks(grad)[1:]
            grad_bands = grad_inputs = None
            if ctx.needs_input_grad[0]:
                grad_bands = layout.bands(torch.bmm(grad_blocks, layout.reach(layout.blocks(inputs)).mT))
            if ctx.needs_input_grad[1]:
                reached = torch.bmm(layout.dense(bands).mT, grad_blocks)
                grad_inputs = layout.tokens(layout.collect(reached)).to(inputs.dtype)
        return grad_bands, grad_inputs


class _Layout:
    """Blocks of tokens of all rows and heads in one line, an empty block before each head's first.

    A block's tokens reach ``window - 1`` tokens back, which never is further than the block before; thanks to the
    empty ones that is never another head's. What is computed for N blocks leaves out the very first, and so stands
    one block earlier: each head's first block first, an empty one last.
    """

    def __init__(self, bands: Tensor) -> None:
        self.rows, self.heads, self.length, self.window = bands.shape
        self.block = max(min(_BLOCK, self.length), self.window)
        self.per_head = -(-self.length // self.block)
        self.width = self.block + self.window - 1  # tokens in reach of a block

    def blocks(self, tokens: Tensor) -> Tensor:
        """Lay out ``(B, H, T, C)`` as ``(N + 1, block, C)``."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        shape = (self.rows, self.heads, (self.per_head + 1) * self.block, tokens.shape[-1])
        line = torch.empty(shape, dtype=wide, device=tokens.device)
        line[:, :, : self.block] = line[:, :, self.block + self.length :] = 0
        line[:, :, self.block : self.block + self.length] = tokens
        return line.view(-1, self.block, tokens.shape[-1])

    def tokens(self, blocks: Tensor) -> Tensor:
        """A view ``(B, H, T, C)`` of ``(N + 1, block, C)``, whose last block counts for nothing."""
        return blocks.view(self.rows, self.heads, -1, blocks.shape[-1])[:, :, : self.length]

    def reach(self, blocks: Tensor) -> Tensor:
        """A view ``(N, width, C)`` of what each block's tokens may reach."""
        channels = blocks.shape[-1]
        strides = (self.block * channels, channels, 1)
        offset = (self.block - self.window + 1) * channels
        return blocks.as_strided((len(blocks) - 1, self.width, channels), strides, offset)

    def collect(self, reached: Tensor) -> Tensor:
        """Add up the gradients ``(N, width, C)`` of what was reached more than once: ``(N + 1, block, C)``."""
        total = reached.new_empty(len(reached) + 1, self.block, reached.shape[-1])
        total[:-1] = reached[:, self.window - 1 :]
        total[:-2, self.block - self.window + 1 :] += reached[1:, : self.window - 1]
        return total

    def dense(self, bands: Tensor) -> Tensor:
        """Every block's diagonals as a matrix ``(N, block, width)``."""
        line = self.blocks(bands)[1:]
        dense = bands.new_zeros(len(line), self.block, self.width)
        self._diagonals(dense).copy_(line)
        return dense

    def bands(self, dense: Tensor) -> Tensor:
        """The other way round: ``(B, H, T, window)``."""
        line = dense.new_empty(len(dense) + 1, self.block, self.window)
        line[:-1] = self._diagonals(dense)
        return self.tokens(line)

    def _diagonals(self, dense: Tensor) -> Tensor:
        """A view ``(N, block, window)``: what a token has for the tokens before it and itself."""
        strides = (self.block * self.width, self.width + 1, 1)
        return dense.as_strided((len(dense), self.block, self.window), strides)
