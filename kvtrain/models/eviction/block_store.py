"""Blocks of tokens, each packed into one slot: what settles there is attended, and never moves or changes again."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.kernels.block_codec import PackedBlocks


class BlockStore(PagedStore):
    """A slot is a block of ``codec.slot_tokens`` tokens, and a page of its own.

    Byte budgets count with a block as soon as its tokens may be complete.

    Args:
        num_heads: Key-value heads.
        codec: How blocks are packed.
        placement: Where tensors lie; blocks are bytes, whatever its dtype.
        open_tokens: The pages of the tokens that have not settled yet.
    """

    def __init__(self, num_heads: int, codec: PackedBlocks, placement: Placement, open_tokens: PagedStore) -> None:
        widths = {"keys": codec.keys.width, "values": codec.values.width}
        super().__init__(num_heads, widths, 1, replace(placement, dtype=torch.uint8))
        self.codec, self.blocks, self.open_tokens = codec, codec, open_tokens
        self.rows.slot_tokens = codec.slot_tokens

    def settle(self, keys: Tensor, values: Tensor, real: Tensor) -> None:
        """Pack whole blocks behind those that are here.

        Args:
            keys: ``(B, H, m, n, D)`` in the order of their positions.
            values: ``(B, H, m, n, D_v)``.
            real: ``(B, H, m)`` blocks that there are, in every head the first ones.
        """
        entries = {"keys": self.blocks.keys.pack(keys), "values": self.blocks.values.pack(values)}
        self.write(entries, self.lengths.unsqueeze(-1) + real.cumsum(-1) - 1, real)

    def _longest(self, tokens: int, rows: int) -> Tensor:
        """See ``PageAllocator``."""
        here, waiting = (pad(store.lengths, (0, 0, 0, rows)) for store in (self, self.open_tokens))
        return here + (waiting + tokens) // self.slot_tokens

    def take_ahead(self, answer: list[int]) -> None:
        """See ``RowStore``; pages are taken when blocks come."""
        if answer[0]:
            self.rows.room = 0
        else:
            super().take_ahead(answer)
