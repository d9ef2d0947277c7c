"""Windowed weighted running means: how DMC merges a token into the segment before it.

The mean of a segment's last ``window`` tokens (Nawrot et al. 2024, Algorithm 1, with the partial
accumulation of the released code) is

    pooled_t = sum_{s > t - window} w_s (prod_{m=s+1..t} a_m) x_s  /  sum of the same without x_s

with merge decisions ``a`` in [0, 1] and importances ``w``. It is a band matrix with ``window``
diagonals, applied block by block as small dense products; nothing is sequential.

Alternatives cost more. A recurrence over tokens is T small steps, and cannot drop what leaves the window without a
difference of sums, which loses digits. A sum over the window of shifted inputs reads and writes ``(B, H, T, C)``
``window`` times; a dense block reads it once and multiplies some zeros, at the speed of a matrix product.

Two autograd functions share the work: ``_BandWeights`` turns decisions and importances into normalized weights (no
channels, so cheap to save), ``_BandProduct`` applies these to the states.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.cpu_tiling import row_tiles
from kvtrain.kernels.dispatch import at_least_float32, autocast_off

_BLOCK = 32  # tokens; of a product with ``block x (block + window - 1)`` weights, ``block x window`` are not zero


def pool_segments(inputs: Tensor, merge: Tensor, importance: Tensor, window: int) -> Tensor:
    """Running means of every token's open segment, in the dtype of ``inputs``; differentiable in all tensors.

    Computed in at least float32.

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
    """Normalized weights ``(window, B, H, T)`` of the latest tokens, the oldest first and the token itself last."""

    @staticmethod
    def forward(ctx: Any, merge: Tensor, importance: Tensor, window: int) -> Tensor:
        weights = _chains(_windows(merge, window)).mul_(_windows(importance, window))
        # Zero importance everywhere means a slot that does not exist: its mean is 0, not 0 / 0.
        total = weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
        bands = weights.div_(total)
        ctx.save_for_backward(merge, importance, bands, total)
        return bands

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        merge, importance, bands, total = ctx.saved_tensors
        window = len(bands)
        merges, importances = _windows(merge, window), _windows(importance, window)
        chains, mean = _chains(merges), (grad * bands).sum(0)
        grad_merge, grad_importance = (_padded(torch.zeros_like(total), window) for _ in range(2))
        grad_chain = torch.zeros_like(total)
        # The product rule from the oldest token of the windows to the newest: a token's chain is a factor of all chains
        # to older tokens, so ``grad_chain`` gathers what these send. Windows overlap: gradients are added up in the
        # padded line, one entry of every window at a time, and no ``(window, B, H, T)`` of them is made.
        for index in range(window):
            grad_weight = (grad[index] - mean).div_(total)
            entry = slice(index, index + merge.shape[-1])  # where the windows' entries of this index lie in the line
            grad_merge[..., entry].addcmul_(grad_chain, chains[index])
            grad_importance[..., entry].addcmul_(grad_weight, chains[index])
            grad_chain.mul_(merges[index]).addcmul_(grad_weight, importances[index])
        return grad_merge[..., window - 1 :], grad_importance[..., window - 1 :], None


def _chains(merges: Tensor) -> Tensor:
    """Suffix products ``(window, B, H, T)`` of the decisions: how far a token is one with each before it, oldest first.

    What is too small to count is 0: left to shrink, products of relaxed decisions become denormal numbers, on which the
    band's product ran four times slower on a CPU. (``cumprod`` lets them shrink, and would need its input flipped.)

    Args:
        merges: The decisions, as ``_windows`` shows them.
    """
    chains = merges.new_empty(merges.shape)
    chains[-1] = 1
    negligible = torch.finfo(merges.dtype).tiny ** 0.5  # 1e-19 in float32
    for index in range(len(merges) - 2, -1, -1):
        torch.mul(chains[index + 1], merges[index + 1], out=chains[index])
        torch.threshold_(chains[index], negligible, 0.0)
    return chains


def _windows(tensor: Tensor, window: int) -> Tensor:
    """A view ``(window, B, H, T)`` of what each of the latest tokens has in ``(B, H, T)``; 0 before the first."""
    return _padded(tensor, window).unfold(-1, tensor.shape[-1], 1).movedim(2, 0)


def _padded(tensor: Tensor, window: int) -> Tensor:
    """As many zeros before the first token as a window reaches back from it."""
    return torch.nn.functional.pad(tensor, (window - 1, 0))


class _BandProduct(torch.autograd.Function):
    """The band matrix ``(window, B, H, T)`` times ``(B, H, T, C)``; keeps its two factors and nothing else.

    Rows go a few at a time, so that the dense blocks, which hold ``width / window`` times what the band does, stay in a
    processor's cache. The backward pass makes them again.
    """

    @staticmethod
    def forward(ctx: Any, bands: Tensor, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(bands, inputs)
        pooled = torch.empty_like(inputs)
        for rows in row_tiles(inputs):
            layout = _Layout(bands[:, rows])
            products = torch.bmm(layout.dense(bands[:, rows]), layout.unfold(layout.blocks(inputs[rows])))
            pooled[rows] = layout.tokens(products)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        bands, inputs = ctx.saved_tensors
        grad_bands = torch.empty_like(bands) if ctx.needs_input_grad[0] else None
        grad_inputs = torch.empty_like(inputs) if ctx.needs_input_grad[1] else None
        with autocast_off(grad):
            for rows in row_tiles(inputs):
                layout = _Layout(bands[:, rows])
                grad_blocks = layout.blocks(grad[rows])[1:]
                if grad_bands is not None:
                    windows = layout.unfold(layout.blocks(inputs[rows]))
                    grad_bands[:, rows] = layout.bands(torch.bmm(grad_blocks, windows.mT))
                if grad_inputs is not None:
                    grad_windows = torch.bmm(layout.dense(bands[:, rows]).mT, grad_blocks)
                    grad_inputs[rows] = layout.tokens(layout.fold(grad_windows))
        return grad_bands, grad_inputs


class _Layout:
    """Blocks of tokens of all rows and heads in one line, an empty block before each head's first.

    A block's tokens reach ``window - 1`` tokens back, which never is further than the block before; thanks to the
    empty ones that is never another head's. What is computed for N blocks leaves out the very first, and so stands
    one block earlier: each head's first block first, an empty one last.

    So all heads of all rows are one batched product of equal blocks, and the overlapping windows are a view. Without
    the empty blocks each head's first block would need a product of its own, or a copy of all windows with zeros.
    """

    def __init__(self, bands: Tensor) -> None:
        self.window, self.rows, self.heads, self.length = bands.shape
        self.block = max(min(_BLOCK, self.length), self.window)  # a window must not reach past the block before
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
        """A view ``(B, H, T, C)`` of ``(N, block, C)``."""
        per_head = (self.per_head + 1) * self.block * blocks.shape[-1]
        shape = (self.rows, self.heads, self.length, blocks.shape[-1])
        return blocks.as_strided(shape, (self.heads * per_head, per_head, blocks.shape[-1], 1))

    def unfold(self, blocks: Tensor) -> Tensor:
        """A view ``(N, width, C)`` of what each block's tokens may reach; neighbours overlap."""
        channels = blocks.shape[-1]
        strides = (self.block * channels, channels, 1)
        offset = (self.block - self.window + 1) * channels
        return blocks.as_strided((len(blocks) - 1, self.width, channels), strides, offset)

    def fold(self, windows: Tensor) -> Tensor:
        """The adjoint of ``unfold``, from ``(N, width, C)`` to ``(N, block, C)``: what overlaps is added up."""
        total = windows[:, self.window - 1 :].contiguous()
        total[:-1, self.block - self.window + 1 :] += windows[1:, : self.window - 1]
        return total

    def dense(self, bands: Tensor) -> Tensor:
        """Every block's diagonals as a matrix ``(N, block, width)``."""
        blocks = self.rows * self.heads * (self.per_head + 1) - 1
        dense = bands.new_zeros(blocks, self.block, self.width)
        missing = self.per_head * self.block - self.length
        if missing:
            bands = torch.nn.functional.pad(bands, (0, missing))
        self._diagonals(dense).copy_(bands.unflatten(3, (self.per_head, self.block)))
        return dense

    def bands(self, dense: Tensor) -> Tensor:
        """The other way round: ``(window, B, H, T)``."""
        return self._diagonals(dense).flatten(3)[..., : self.length]

    def _diagonals(self, dense: Tensor) -> Tensor:
        """A view ``(window, B, H, N / H, block)``: what a token has for the tokens before it and itself.

        Row ``i`` of a block's matrix begins at column ``i``: one step of ``width + 1`` goes down along a diagonal.
        """
        matrix = self.block * self.width
        per_head = (self.per_head + 1) * matrix
        shape = (self.window, self.rows, self.heads, self.per_head, self.block)
        return dense.as_strided(shape, (1, self.heads * per_head, per_head, matrix, self.width + 1))
