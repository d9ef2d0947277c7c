"""The serving cache: one paged store for both kinds of heads, of which streaming ones stop growing.

What leaves the window of a streaming head can be kept track of: summed up, for the token that stands for all of it, and
set aside, so that the latest tokens can be taken back. Both are done with what pages hold of it, quantized or not, so
that they agree, whichever tokens came with it.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.cache.state import StateStore
from kvtrain.kernels.compensation import Dropped
from kvtrain.models.ordering import take_slots

Entries = dict[str, Tensor]  # "keys" and "values", (B, H_streaming, n, D), or what pages hold of them


class _Sums(StateStore):
    """Sums of all that the windows of a row have dropped, in at least float32; the row's length says how many."""

    def __init__(self, num_heads: int, head_dim: int, placement: Placement) -> None:
        kind = ((num_heads, head_dim), torch.promote_types(placement.dtype, torch.float32))
        super().__init__({"keys": kind, "values": kind}, placement)

    def add(self, left: Entries) -> Entries:
        """Add entries one after the other, zeros where there is none, and return the sums after each."""
        running = {name: self[name].unsqueeze(2) + states.to(self[name]).cumsum(2) for name, states in left.items()}
        for name, sums in running.items():
            self[name] = sums[:, :, -1]
        return running

    def take_out(self, entries: Entries, empty: Tensor) -> None:
        """Subtract entries; nothing is left in the rows ``(B,)`` marked."""
        for name in self.shapes:
            sums = self[name]
            if name in entries:
                sums = sums - entries[name].to(sums).sum(2)
            self[name] = sums.masked_fill(empty[:, None, None], 0)


class _Evicted(StateStore):
    """The latest tokens that have left the windows of a row, as pages hold them: ``p`` lies in slot ``p % slack``.

    Its ``end`` is the position behind the last token that it ever took up; it holds those from ``end - slack`` on.
    """

    def __init__(self, num_heads: int, width: int, dtype: torch.dtype, slack: int, placement: Placement) -> None:
        kind = ((num_heads, slack, width), dtype)
        super().__init__({"keys": kind, "values": kind, "end": ((), torch.long)}, placement)
        self.slack = slack

    def put(self, left: Entries, positions: Tensor, leaves: Tensor, ends: Tensor) -> None:
        """Take up tokens at ``positions (B, n)``, those that ``leaves (B, n)`` marks, before ``ends (B,)``."""
        self["end"] = torch.maximum(self["end"], ends)
        if leaves.shape[1] == 1:
            row = torch.arange(len(ends), device=ends.device)
            slot = positions.squeeze(1) % self.slack
            for name, states in left.items():
                new = states.detach()[:, :, 0].to(self[name].dtype)
                self[name][row, :, slot] = torch.where(leaves[:, :, None], new, self[name][row, :, slot])
            return
        kept = leaves & (positions >= (ends - self.slack)[:, None])  # the others would be overwritten at once
        row, entry = kept.nonzero(as_tuple=True)
        slot = positions[row, entry] % self.slack
        for name, states in left.items():
            self[name][row, :, slot] = states.detach()[row, :, entry].to(self[name].dtype)

    def take(self, positions: Tensor, real: Tensor) -> Entries:
        """Copies of the tokens at ``positions (B, n)``, zeros where they are not ``real (B, n)``."""
        copies = {name: take_slots(self[name], positions % self.slack) for name in ("keys", "values")}
        return {name: states.masked_fill(~real[:, None, :, None], 0) for name, states in copies.items()}


class StreamingCacheLayer(KVCacheLayer):
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
        compensation: Whether to sum up what streaming heads drop.
        slack: Latest ones of these tokens to set aside.
        bits: Of a channel in quantized pages; None keeps keys and values as they are.
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
        compensation: bool = False,
        slack: int = 0,
        bits: int | None = None,
    ) -> None:
        self.num_full, self.head_dim, self.sink, self.recent = num_full, head_dim, sink, recent
        self.num_streaming = num_heads - num_full
        dims, capacity = {"keys": head_dim, "values": head_dim}, sink + recent
        self.pages = PagedStore(num_heads, dims, page_size, placement, bits, max_slots=capacity, num_unbounded=num_full)
        tracks, page = self.num_streaming > 0, self.pages.pool.slots["keys"]
        self.sums = _Sums(self.num_streaming, head_dim, placement) if compensation and tracks else None
        kind = (self.num_streaming, page.shape[-1], page.dtype, slack)
        self.evicted = _Evicted(*kind, placement) if slack and tracks else None
        super().__init__(*(store for store in (self.pages, self.sums, self.evicted) if store is not None))

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``."""
        return self.pages.lengths

    def drop(self, keys: Tensor, values: Tensor, past: Tensor, valid: Tensor) -> Dropped | None:
        """Keep track of what leaves windows as new tokens enter; ``write`` comes after it, with the same arguments.

        Returns:
            With compensation, what each of the new tokens no longer sees.
        """
        if self.sums is None and self.evicted is None:
            return None
        positions = past[:, None] + valid.cumsum(-1) - 1 - self.recent  # (B, n) of the tokens that leave
        leaves = valid & (positions >= self.sink)
        new = {"keys": keys[:, self.num_full :], "values": values[:, self.num_full :]}
        left = self._leaving(new, positions, leaves, leaves & (positions < past[:, None]))
        if self.evicted is not None:
            self.evicted.put(left, positions, leaves, past + valid.sum(-1) - self.recent)
        if self.sums is None:
            return None
        return Dropped(**self.sums.add(self._opened(left)), number=(positions - self.sink + 1).clamp(min=0))

    def write(self, keys: Tensor, values: Tensor, past: Tensor, valid: Tensor | None) -> None:
        """Keep new tokens, and let go what no later token will see.

        Args:
            keys: ``(B, H_kv, n, D)``.
            values: ``(B, H_kv, n, D)``.
            past: ``(B,)`` tokens of each row before them.
            valid: ``(B, n)`` real tokens; None: one in every row.
        """
        if valid is None:
            self.pages.write({"keys": keys, "values": values}, self._slots_by_head(past[:, None]))
            return
        positions = past[:, None] + valid.cumsum(-1) - 1  # (B, n)
        latest = positions >= (past + valid.sum(-1))[:, None] - self.recent
        # Of several new tokens for one slot only the last may be written: the order of writes is not defined.
        streams = valid & ((positions < self.sink) | latest)
        self.pages.write({"keys": keys, "values": values}, *self._by_head(positions, valid, streams))

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
            shape = (past.shape[0], self.num_streaming, 0, self.head_dim)
            nothing = torch.zeros(shape, dtype=self.pages.placement.dtype, device=past.device)
            return nothing, nothing, positions
        keys, values = (self.pages.gather(name, slots, heads) for name in ("keys", "values"))
        return keys, values, positions

    def check_rollback(self, tokens: Tensor, past: Tensor) -> None:
        """See ``KVCacheLayer``; a window that has moved goes back as far as what it dropped was set aside."""
        if not self.num_streaming:
            return
        left = past - tokens
        end, slack = (past - self.recent, 0) if self.evicted is None else (self.evicted["end"], self.evicted.slack)
        lacking = (end - slack - self._first_recent(left)).masked_fill(left <= self.sink, 0)
        if bool((lacking > 0).any()):
            row = int(lacking.argmax())
            raise ValueError(
                f"row {row} cannot go back by {int(tokens[row])} tokens: streaming heads have dropped some that they "
                f"saw then. Call make_cache(slack={slack + int(lacking[row])}), or use snapshot_row and restore_row"
            )

    def rollback(self, tokens: Tensor, past: Tensor) -> None:
        """See ``KVCacheLayer``."""
        left = past - tokens
        if self.num_streaming:
            self._take_back(left, past)
        lengths = left[:, None].repeat(1, self.pages.num_heads)
        lengths[:, self.num_full :].clamp_(max=self.sink + self.recent)
        self.pages.truncate(lengths)

    def _take_back(self, left: Tensor, past: Tensor) -> None:
        """Return to windows what had not left them when a row had ``left (B,)`` tokens of ``past (B,)``."""
        returned: Entries = {}
        nothing_dropped = left <= self.sink + self.recent
        if self.evicted is not None:
            first = self._first_recent(left)  # more than the slack only where sinks are left alone, and none is needed
            count = (past - self.recent - first).clamp(0, self.evicted.slack)
            column = torch.arange(int(count.max()) if count.numel() else 0, device=left.device)
            positions, real = first[:, None] + column, column < count[:, None]
            returned = self.evicted.take(positions, real)
            padded = {name: pad(states, (0, 0, 0, 0, self.num_full, 0)) for name, states in returned.items()}
            seen = real & (positions < left[:, None])
            self.pages.write(padded, *self._by_head(positions, torch.zeros_like(seen), seen), packed=True)
            self.evicted["end"] = self.evicted["end"].masked_fill(nothing_dropped, 0)
        if self.sums is not None:
            self.sums.take_out(self._opened(returned), nothing_dropped)

    def _opened(self, entries: Entries) -> Entries:
        """Keys and values, from what pages hold of them."""
        return {name: self.pages.unpack(name, states) for name, states in entries.items()}

    def _leaving(self, new: Entries, positions: Tensor, leaves: Tensor, held: Tensor) -> Entries:
        """What pages hold of the tokens that leave as each of the ``new`` ones enters, zeros where none does.

        They are new ones themselves, ``recent`` places before, or those ``held (B, n)`` in the ring.
        """
        one = held.shape[1] == 1  # whose ring is read without asking whether it must be
        columns = torch.zeros(1, dtype=torch.long, device=held.device) if one else held.any(0).nonzero().squeeze(1)
        held_here = held[:, None, columns, None]
        slots = self._slot(positions[:, columns]).masked_fill(~held[:, columns], 0)
        left = {}
        for name, states in new.items():
            shifted = pad(self.pages.pack(states), (0, 0, self.recent, 0))[:, :, : states.shape[2]]
            left[name] = torch.where((leaves & ~held)[:, None, :, None], shifted, 0)
            if columns.numel():
                ring = self.pages.gather_packed(name, slots, slice(self.num_full, None))
                left[name][:, :, columns] = torch.where(held_here, ring, left[name][:, :, columns])
        return left

    def _by_head(self, positions: Tensor, full: Tensor, streaming: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of ``positions (B, n)``, and whether each kind of head keeps them, both ``(B, H_kv, n)``."""
        return self._slots_by_head(positions), self._stack(full, streaming)

    def _slots_by_head(self, positions: Tensor) -> Tensor:
        return self._stack(positions, self._slot(positions))

    def _stack(self, full: Tensor, streaming: Tensor) -> Tensor:
        """What is true of full heads and of streaming ones, both ``(B, n)``, for all of them."""
        heads = (full[:, None].expand(-1, self.num_full, -1), streaming[:, None].expand(-1, self.num_streaming, -1))
        return torch.cat(heads, 1)

    def _first_recent(self, tokens: Tensor) -> Tensor:
        """First position behind the sinks that a window shows in rows of ``tokens (B,)``."""
        return (tokens - self.recent).clamp(min=self.sink)

    def _slot(self, positions: Tensor) -> Tensor:
        return torch.where(positions < self.sink, positions, self.sink + (positions - self.sink) % self.recent)
