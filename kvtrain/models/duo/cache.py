"""The serving cache: one paged store for both kinds of heads, of which streaming ones stop growing."""

import torch
from torch import Tensor

from kvtrain.cache.base import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement


class _HeadPages(PagedStore):
    """Pages on which some heads never need more than ``capacity`` slots.

    Args:
        num_full: Heads that grow without end; they come first.
        capacity: Slots of the others.
        num_heads: All heads.
        head_dim: Channels of keys, and of values.
        page_size: Slots in a page.
        placement: Where tensors lie.
    """

    def __init__(
        self, num_full: int, capacity: int, num_heads: int, head_dim: int, page_size: int, placement: Placement
    ) -> None:
        super().__init__(num_heads, {"keys": head_dim, "values": head_dim}, page_size, placement)
        self.num_full, self.capacity = num_full, capacity

    def _longest(self, tokens: int, rows: int) -> Tensor:
        longest = super()._longest(tokens, rows)
        longest[:, self.num_full :] = longest[:, self.num_full :].clamp(max=self.capacity)
        return longest


class DuoCacheLayer(KVCacheLayer):
    """Keys (rotated) and values of one layer.

    Token ``p`` of a row lies in slot ``p`` of a full head. In a streaming head it lies in slot ``p`` if ``p < sink``,
    else in ``sink + (p - sink) % recent``: no slot moves, and every slot in use is visible to the next token.

    Args:
        num_full: Full heads; they come first.
        num_heads: Key-value heads.
        head_dim: Channels of a head.
        sink: First tokens that streaming heads keep.
        recent: Latest tokens that they keep.
        placement: Where tensors lie.
        page_size: Slots in a page.
    """

    def __init__(
        self,
        num_full: int,
        num_heads: int,
        head_dim: int,
        sink: int,
        recent: int,
        placement: Placement,
        page_size: int,
    ) -> None:
        self.num_full, self.head_dim, self.sink, self.recent = num_full, head_dim, sink, recent
        self.pages = _HeadPages(num_full, sink + recent, num_heads, head_dim, page_size, placement)
        super().__init__(self.pages)

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths

    def write(self, keys: Tensor, values: Tensor, past: Tensor, valid: Tensor) -> None:
        """Keep new tokens, and let go what no later token will see.

        Args:
            keys: ``(B, H_kv, n, D)``.
            values: ``(B, H_kv, n, D)``.
            past: ``(B,)`` tokens of each row before them.
            valid: ``(B, n)`` real tokens.
        """
        positions = past[:, None] + valid.cumsum(-1) - 1  # (B, n)
        latest = positions >= (past + valid.sum(-1))[:, None] - self.recent
        num_streaming = self.pages.num_heads - self.num_full
        slots = _stack(positions, self.num_full, self._slot(positions), num_streaming)
        # Of several new tokens for one slot only the last may be written: the order of writes is not defined.
        keep = _stack(valid, self.num_full, valid & ((positions < self.sink) | latest), num_streaming)
        self.pages.write({"keys": keys, "values": values}, slots, keep)

    def window(self, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What streaming heads hold that a token after ``past (B,)`` others may see.

        Returns:
            Keys ``(B, H_streaming, S, D)``, values, and positions ``(B, S)``, -1 where there is none: sinks, then the
            latest tokens, in order.
        """
        longest = int(past.max()) if past.numel() else 0
        first = torch.arange(min(self.sink, longest), device=past.device).expand(past.shape[0], -1)
        latest = past[:, None] - torch.arange(min(self.recent - 1, longest), 0, -1, device=past.device)
        positions = torch.cat([first.where(first < past[:, None], -1), latest.where(latest >= self.sink, -1)], 1)
        slots, heads = self._slot(positions.clamp(min=0)), slice(self.num_full, None)
        if not positions.shape[1]:
            shape = (past.shape[0], self.pages.num_heads - self.num_full, 0)
            nothing = self.pages.pool.slots["keys"].new_zeros(*shape, self.head_dim)
            return nothing, nothing, positions
        keys, values = (self.pages.gather(name, slots, heads) for name in ("keys", "values"))
        return keys, values, positions

    def _slot(self, positions: Tensor) -> Tensor:
        return torch.where(positions < self.sink, positions, self.sink + (positions - self.sink) % self.recent)


def _stack(full: Tensor, num_full: int, streaming: Tensor, num_streaming: int) -> Tensor:
    """``(B, n)`` of both kinds of heads to ``(B, H_kv, n)``."""
    return torch.cat([full[:, None].expand(-1, num_full, -1), streaming[:, None].expand(-1, num_streaming, -1)], 1)
