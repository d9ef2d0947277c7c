"""What transformers' generation asks of a cache, in words of rows and tokens."""

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class GeneratingCache(Cache):
    """A cache whose length is that of its longest row, padding included.

    Attributes:
        seen: Positions that went by, padding included: the logical length that ``generate`` counts with.
    """

    seen: int

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows, B."""

    @property
    @abstractmethod
    def tokens(self) -> Tensor:
        """Real tokens that each row has seen, ``(B,)``."""

    @abstractmethod
    def select_rows(self, indices: Tensor) -> None:
        """Keep, repeat, reorder or drop rows: the new row ``i`` is the old row ``indices[i]``, ``(B_new,)``."""

    @abstractmethod
    def rollback(self, tokens: int | Tensor) -> None:
        """Take back the latest tokens of every row, as if they had never come."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Logical key length and offset."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: rows change places, with all their state."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, for several returned sequences."""
        self.select_rows(torch.arange(self.num_rows, device=self.tokens.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.select_rows(indices)

    def crop(self, max_length: int) -> None:
        """Roll every row back by the same number of tokens; assisted decoding does.

        Args:
            max_length: The logical length to go back to; if negative, the number of tokens to drop; 0 drops none.

        Raises:
            ValueError: As ``rollback``.
        """
        tokens = self.seen - max_length if max_length > 0 else -max_length
        if tokens > 0:
            self.rollback(tokens)
