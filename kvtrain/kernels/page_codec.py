"""How keys and values are read from pages that hold something else in their place."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtrain.kernels.quantization import dequantize, packed_channels


class PageCodec(ABC):
    """Opens pages of bytes.

    Attributes:
        slot_tokens: Tokens that a slot holds.
    """

    slot_tokens: int = 1

    @abstractmethod
    def value_dim(self, width: int) -> int:
        """Channels of a value, where a slot of values takes so many bytes."""

    @abstractmethod
    def open(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What pages hold, as numbers.

        Args:
            keys: ``(..., page_size, bytes)``.
            values: ``(..., page_size, bytes)``.
            dtype: Of what comes out.

        Returns:
            Keys ``(..., page_size * slot_tokens, D)`` and values ``(..., page_size * slot_tokens, D_v)``, contiguous.
        """


@dataclass(frozen=True)
class RoundedVectors(PageCodec):
    """Every vector in a few bits a channel, as ``kernels.quantization.quantize`` packs it.

    Args:
        bits: 8, 4 or 2.
        group: Channels that share a scale and a zero; None: all.
    """

    bits: int
    group: int | None = None

    def value_dim(self, width: int) -> int:
        """See ``PageCodec``."""
        return packed_channels(width, self.bits, self.group)

    def open(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See ``PageCodec``."""
        key, value = (
            dequantize(packed, self.bits, self.value_dim(packed.shape[-1]), dtype, self.group)
            for packed in (keys, values)
        )
        return key, value
