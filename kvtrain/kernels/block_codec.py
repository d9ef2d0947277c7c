"""Blocks of keys or values in few bits, as GEAR keeps them (Kang et al. 2024, arXiv 2403.05527).

``X ~ opened(codes) with outliers as they were + left right^T``

A block of n tokens and D channels is quantised vector by vector: keys channel by channel along the tokens, because some
channels are large in all of them, values token by token. The largest and smallest entries of a vector are kept beside
it and do not widen its scale; what quantisation missed is approached by a matrix of low rank. Whatever a block holds,
it takes the same bytes, in this order: every vector's codes, scale and zero, outliers in float16, their places in a
byte each, and both factors in float16.

Without outliers and rank it is KIVI's layout (Liu et al. 2024, arXiv 2402.02750), its groups as long as a vector.
"""

from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from torch import Tensor

from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.page_codec import PageCodec
from kvtrain.kernels.quantization import dequantize, quantize

_ITERATIONS = 3  # of the power method; a singular value decomposition is what they approach
_LARGEST = torch.finfo(torch.float16).max
_PLACES = 256  # that a byte tells apart


@dataclass(frozen=True)
class BlockCodec:
    """How a block ``(n, D)`` becomes bytes.

    Args:
        tokens: n.
        channels: D.
        by: What has a scale and a zero of its own: a ``"channel"`` or a ``"token"``.
        bits: Of an entry: 8, 4 or 2.
        outliers: Entries of every vector that are kept at each of its ends.
        rank: Of what approaches the rest; no more than a block has.

    Raises:
        ValueError: Other bits, vectors that leave a byte half empty or are too long for their outliers' places, or
            outliers that leave nothing between them.
    """

    tokens: int
    channels: int
    by: Literal["channel", "token"]
    bits: int
    outliers: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 2, 4 or 8, not {self.bits}")
        if self.length * self.bits % 8:
            raise ValueError(
                f"{self.bits} bits hold {8 // self.bits} entries a byte, and vectors of {self.length} are no multiple "
                "of that; use 8 bits, or another block"
            )
        if self.outliers and self.length > _PLACES:
            raise ValueError(f"outliers of a vector have places below {_PLACES}, not {self.length}; use outliers=0")
        if 2 * self.outliers >= self.length:
            raise ValueError(
                f"{self.outliers} outliers at each end leave nothing of vectors of {self.length}; use fewer outliers"
            )

    @property
    def count(self) -> int:
        """Vectors of a block."""
        return self.channels if self.by == "channel" else self.tokens

    @property
    def length(self) -> int:
        """Entries of a vector."""
        return self.tokens if self.by == "channel" else self.channels

    @property
    def parts(self) -> list[int]:
        """Bytes of the codes with their constants, the outliers, their places, and both factors."""
        both, rank = 2 * self.outliers * self.count, self._rank
        codes = self.count * (self.length * self.bits // 8 + 4)
        return [codes, 2 * both, both, 2 * self.tokens * rank, 2 * self.channels * rank]

    @property
    def width(self) -> int:
        """Bytes of a block."""
        return sum(self.parts)

    @property
    def _rank(self) -> int:
        return min(self.rank, self.tokens, self.channels)

    def pack(self, blocks: Tensor) -> Tensor:
        """Blocks ``(..., n, D)`` as uint8 ``(..., width)``; what lies beyond float16 saturates."""
        wide = at_least_float32(blocks).clamp(-_LARGEST, _LARGEST)
        vectors = self._vectors(wide)  # (..., count, length)
        places, exact = self._find_outliers(vectors)
        codes = quantize(_without(vectors, places), self.bits)
        left, right = self._low_rank(wide - self._vectors(self._opened(codes, exact, places, wide.dtype)))
        parts = [codes, exact, places.to(torch.uint8), left.half(), right.half()]
        return torch.cat([part.flatten(-2).contiguous().view(torch.uint8) for part in parts if part.shape[-1]], -1)

    def open(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """What ``pack`` made, ``(..., n, D)`` again, contiguous."""
        compute, shape = torch.promote_types(dtype, torch.float32), packed.shape[:-1]
        codes, exact, places, left, right = (
            part.contiguous() for part in packed.reshape(-1, self.width).split(self.parts, -1)
        )
        blocks = self._vectors(
            self._opened(
                codes.unflatten(-1, (self.count, -1)),
                exact.view(torch.float16).unflatten(-1, (self.count, 2 * self.outliers)),
                places.unflatten(-1, (self.count, 2 * self.outliers)).long(),
                compute,
            )
        ).contiguous()
        if self._rank:
            left, right = (
                factor.view(torch.float16).unflatten(-1, (size, self._rank)).to(compute)
                for factor, size in ((left, self.tokens), (right, self.channels))
            )
            blocks.baddbmm_(left, right.mT)
        return blocks.to(dtype).view(*shape, self.tokens, self.channels)

    def _vectors(self, blocks: Tensor) -> Tensor:
        """What is quantised together, as rows; its own inverse."""
        return blocks.mT if self.by == "channel" else blocks

    def _find_outliers(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Places ``(..., count, 2 s)`` of the smallest and largest entries, and these in float16."""
        if not self.outliers:
            none = vectors[..., :0]
            return none.long(), none.half()
        order = vectors.argsort(dim=-1, stable=True)
        places = torch.cat([order[..., : self.outliers], order[..., -self.outliers :]], -1)
        return places, vectors.gather(-1, places).half()

    def _opened(self, codes: Tensor, exact: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors ``(..., count, length)``, without what is approached."""
        vectors = dequantize(codes, self.bits, self.length, dtype)
        return vectors.scatter_(-1, places, exact.to(dtype)) if self.outliers else vectors

    def _low_rank(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``(..., n, r)`` and ``(..., D, r)`` of ``(..., n, D)``: the power method, from a fixed start."""
        right = _start(self.channels, self._rank, rest).expand(*rest.shape[:-2], -1, -1)
        left = rest @ right
        if self._rank:
            for _ in range(_ITERATIONS):
                left = torch.linalg.qr(rest @ right).Q
                right = rest.mT @ left
        return left, right.clamp(-_LARGEST, _LARGEST)


@dataclass(frozen=True)
class PackedBlocks(PageCodec):
    """Slots that hold a block each; see ``PageCodec``.

    Args:
        keys: How keys are packed.
        values: How values are.
    """

    keys: BlockCodec
    values: BlockCodec

    @property
    def slot_tokens(self) -> int:  # type: ignore[override]
        """See ``PageCodec``."""
        return self.keys.tokens

    def value_dim(self, width: int) -> int:
        """See ``PageCodec``."""
        return self.values.channels

    def open(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See ``PageCodec``."""
        return self.keys.open(keys, dtype).flatten(-3, -2), self.values.open(values, dtype).flatten(-3, -2)


def _without(vectors: Tensor, places: Tensor) -> Tensor:
    """Vectors whose outliers are the mean of what is left, so that they widen no scale."""
    if not places.shape[-1]:
        return vectors
    rest = vectors.scatter(-1, places, 0.0).sum(-1, keepdim=True) / (vectors.shape[-1] - places.shape[-1])
    return vectors.scatter(-1, places, rest.expand_as(places))


def _start(channels: int, rank: int, like: Tensor) -> Tensor:
    """Columns ``(D, r)`` of a cosine transform: orthogonal, the same on every machine, and no channel's own."""
    places = torch.arange(channels, dtype=like.dtype, device=like.device)[:, None] + 0.5
    return torch.cos(pi / channels * places * torch.arange(rank, dtype=like.dtype, device=like.device))
