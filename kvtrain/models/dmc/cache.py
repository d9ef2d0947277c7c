"""DMC's serving cache: ragged slots on pages, and the open segment of every head."""

import torch
from torch import Tensor

from kvtrain.cache.paged import PagedCacheLayer
from kvtrain.kernels.pooling import pool_segments


class DMCCacheLayer(PagedCacheLayer):
    """Slots of one layer, a length for every row and head, and what the last slot is made of.

    The last ``window - 1`` tokens of each open segment are kept unrotated with their importances, and
    every mean is computed from them: nothing is subtracted, so long segments do not drift (P14).

    Args:
        num_heads: Key-value heads.
        window: Tokens of a segment that count.
        page_size: Slots in a page.
    """

    def __init__(self, num_heads: int, window: int, page_size: int) -> None:
        super().__init__(num_heads, page_size)
        self.window = window
        self.segment: Tensor | None = None  # (B, H, window - 1, 2 D), unrotated keys and values
        self.importance: Tensor | None = None  # (B, H, window - 1), 0 where there is no token

    def is_open(self) -> Tensor | None:
        """Heads ``(B, H)`` with a segment that the next token may join; None before the first token."""
        if self.importance is None:
            return None
        if self.window == 1:  # nothing is kept of a segment whose mean is its last token
            return self.store.lengths > 0
        return self.importance[..., -1] > 0

    def extend_segment(self, inputs: Tensor, merge: Tensor, importance: Tensor) -> Tensor:
        """Pool new tokens with the open segments, and keep what later tokens will need.

        Args:
            inputs: ``(B, H, n, 2 D)`` unrotated keys and values.
            merge: ``(B, H, n)`` hard decisions.
            importance: ``(B, H, n)``, 0 for padding.

        Returns:
            Means ``(B, H, n, 2 D)`` in at least float32.
        """
        kept = self.window - 1
        if self.segment is None or self.importance is None:
            self.segment = inputs.new_zeros(*inputs.shape[:2], kept, inputs.shape[-1])
            self.importance = importance.new_zeros(*importance.shape[:2], kept)
        inputs = torch.cat([self.segment.to(inputs.dtype), inputs], 2)
        importance = torch.cat([self.importance, importance], 2)
        merge = torch.nn.functional.pad(merge, (kept, 0), value=1.0)
        pooled = pool_segments(inputs, merge, importance, self.window)[:, :, kept:]
        if kept:
            # A token belongs to the open segment if everything after it has merged.
            later = torch.nn.functional.pad(merge[..., 1:], (0, 1), value=1.0)
            in_segment = later.flip(-1).cumprod(-1).flip(-1)[..., -kept:]
            self.segment = inputs[:, :, -kept:].clone()
            self.importance = importance[..., -kept:] * in_segment
        return pooled

    def write(self, keys: Tensor, values: Tensor, merge: Tensor, valid: Tensor) -> None:
        """Put the states of new tokens into their slots; those that a successor has absorbed are skipped.

        Args:
            keys: ``(B, H, n, D)`` pooled and rotated.
            values: ``(B, H, n, D)`` pooled.
            merge: ``(B, H, n)`` hard decisions.
            valid: ``(B, n)`` real tokens.
        """
        real = valid[:, None].expand(merge.shape)
        lengths = self.store.lengths if self.store.num_rows else torch.zeros_like(merge[..., 0], dtype=torch.long)
        slots = lengths.unsqueeze(-1) - 1 + (real & (merge == 0)).cumsum(-1)
        absorbed = torch.nn.functional.pad(merge[..., 1:], (0, 1)) > 0
        self.store.write(keys, values, slots, real & ~absorbed)
        self.seen += keys.shape[2]

    def tensors(self) -> list[Tensor]:
        """See ``KVCacheLayer``."""
        held = [*super().tensors(), self.segment, self.importance]
        return [tensor for tensor in held if tensor is not None]

    def select_rows(self, indices: Tensor) -> None:
        """See ``KVCacheLayer``."""
        super().select_rows(indices)
        if self.segment is not None and self.importance is not None:
            self.segment, self.importance = self.segment[indices], self.importance[indices]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.segment = self.importance = None
