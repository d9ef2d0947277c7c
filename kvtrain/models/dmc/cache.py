"""DMC's serving cache: ragged slots on pages, and the open segment of every head."""

import torch
from torch import Tensor

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.cache.state import StateStore
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.pooling import pool_segments
from kvtrain.models.ordering import padding_first, take_slots


class DMCCacheLayer(KVCacheLayer):
    """Slots of one layer, a length for every row and head, and what the last slot is made of.

    The last ``window - 1`` tokens of each open segment are kept unrotated with their importances, and
    every mean is computed from them: nothing is subtracted, so long segments do not drift.

    Args:
        num_heads: Key-value heads.
        head_dim: Channels of a head.
        placement: Where tensors lie.
        window: Tokens of a segment that count.
        page_size: Slots in a page.
    """

    def __init__(self, num_heads: int, head_dim: int, placement: Placement, window: int, page_size: int) -> None:
        self.window = window
        self.pages = PagedStore(num_heads, {"keys": head_dim, "values": head_dim}, page_size, placement)
        shape = (num_heads, window - 1)
        wide = torch.promote_types(placement.dtype, torch.float32)
        # Unrotated keys and values side by side; importances are 0 where there is no token.
        states = {"tokens": ((*shape, 2 * head_dim), placement.dtype), "importance": (shape, wide)}
        self.segment = StateStore(states, placement)
        super().__init__(self.pages, self.segment)

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths

    def is_open(self) -> Tensor:
        """Heads ``(B, H)`` with a segment that the next token may join."""
        if self.window == 1:  # nothing is kept of a segment whose mean is its last token
            return self.pages.lengths > 0
        return self.segment["importance"][..., -1] > 0

    def extend_segment(self, inputs: Tensor, merge: Tensor, importance: Tensor, valid: Tensor | None) -> Tensor:
        """Pool new tokens with the open segments, and keep what later tokens will need.

        Args:
            inputs: ``(B, H, n, 2 D)`` unrotated keys and values.
            merge: ``(B, H, n)`` hard decisions, 0 for padding.
            importance: ``(B, H, n)``.
            valid: ``(B, n)`` real tokens; padding stands before them and changes nothing. None: one in every row.

        Returns:
            Means ``(B, H, n, 2 D)``, computed in at least float32.
        """
        kept = self.window - 1
        importance = importance if valid is None else importance * valid[:, None]
        tokens, weights = self.segment["tokens"].to(inputs.dtype), self.segment["importance"]
        if merge.shape[2] == 1:
            inputs = torch.cat([tokens, inputs], 2)
            importance = torch.cat([weights * merge, importance], 2)
            pooled = _mean(inputs, importance)
            if valid is None:
                tokens, weights = inputs[:, :, 1:], importance[..., 1:]
            else:  # of a row that waits, the segment stays as it is
                tokens = torch.where(valid[:, None, :, None], inputs[:, :, 1:], tokens)
                weights = torch.where(valid[:, None], importance[..., 1:], weights)
        else:
            assert valid is not None
            inputs, importance = torch.cat([tokens, inputs], 2), torch.cat([weights, importance], 2)
            merge = torch.nn.functional.pad(merge, (kept, 0), value=1.0)
            order = _padding_first(kept, valid)
            if order is not None:
                inputs, importance, merge = (take_slots(part, order) for part in (inputs, importance, merge))
            pooled = pool_segments(inputs, merge, importance, self.window)
            pooled = (pooled if order is None else take_slots(pooled, order.argsort(1)))[:, :, kept:]
            # A token belongs to the open segment if everything after it has merged.
            later = torch.nn.functional.pad(merge[..., 1:], (0, 1), value=1.0)
            in_segment = later.flip(-1).cumprod(-1).flip(-1)
            first = inputs.shape[2] - kept
            tokens, weights = inputs[:, :, first:], (importance * in_segment)[..., first:]
        self.segment["tokens"], self.segment["importance"] = tokens, weights
        return pooled

    def write(self, keys: Tensor, values: Tensor, merge: Tensor, valid: Tensor | None) -> None:
        """Put the states of new tokens into their slots; those that a successor has absorbed are skipped.

        Args:
            keys: ``(B, H, n, D)`` pooled and rotated.
            values: ``(B, H, n, D)`` pooled.
            merge: ``(B, H, n)`` hard decisions.
            valid: ``(B, n)`` real tokens; None: one in every row.
        """
        if valid is None:
            slots = self.pages.lengths.unsqueeze(-1) - merge.long()
            self.pages.write({"keys": keys, "values": values}, slots)
            return
        real = valid[:, None].expand(merge.shape)
        slots = self.pages.lengths.unsqueeze(-1) - 1 + (real & (merge == 0)).cumsum(-1)
        absorbed = torch.nn.functional.pad(merge[..., 1:], (0, 1)) > 0
        self.pages.write({"keys": keys, "values": values}, slots, real & ~absorbed)


def _mean(inputs: Tensor, importance: Tensor) -> Tensor:
    """The weighted mean ``(B, H, 1, C)`` of all tokens of ``(B, H, n, C)``; 0 where nothing weighs."""
    weights = importance / importance.sum(-1, keepdim=True).clamp(min=torch.finfo(importance.dtype).tiny)
    return (weights.unsqueeze(2) @ at_least_float32(inputs)).to(inputs.dtype)


def _padding_first(kept: int, valid: Tensor) -> Tensor | None:
    """Order ``(B, kept + n)`` that puts the padding before a segment's ``kept`` tokens; None where there is none."""
    if bool(valid.all()):
        return None
    held = torch.ones(valid.shape[0], kept, dtype=torch.bool, device=valid.device)
    return padding_first(torch.cat([held, valid], 1))
