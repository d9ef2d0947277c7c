"""The serving cache: one memory for every layer that owns keys and values, none for the others.

Owners that see everything share one paged store, since their rows have the same length: one table, and a tensor of
keys and one of values an owner. Owners with a window have a ring of pages each. Cyclic stages remember the inputs of a
block that a prompt was cut in, until the next tokens come.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.ring import PagedRing, RingStore
from kvtrain.cache.rows import Placement, RowStore
from kvtrain.models.hosts import common_key_value_shape
from kvtrain.models.lckv.config import LCKV
from kvtrain.models.lckv.kv_map import KVMap


class PendingInputs(PagedStore):
    """Inputs of a cyclic stage for the tokens of an unfinished block: one page a row, given back when it ends.

    Args:
        hidden_size: Channels.
        block: Tokens of a block.
        placement: Where tensors lie.
    """

    def __init__(self, hidden_size: int, block: int, placement: Placement) -> None:
        alone = replace(placement, reserve=None)
        super().__init__(1, {"inputs": hidden_size}, block, alone, max_slots=block)  # a page a row at most
        self._idle = False  # whether nothing is held for sure

    @property
    def counts(self) -> Tensor:
        """Tokens that each row remembers, ``(B,)``."""
        return self.lengths[:, 0]

    def any_held(self) -> bool:
        """Whether a row remembers anything, as far as is known without asking the device."""
        return not self._idle and self.pool.num_pages > len(self.pool.free)

    def inputs(self) -> Tensor:
        """``(B, n, hidden)`` of the longest row's n; a row's entries stand at the end."""
        longest = int(self.counts.max()) if self.num_rows else 0
        slots = torch.arange(longest, device=self.table.device) - (longest - self.counts[:, None])  # (B, n)
        held = self.pool.slots["inputs"]
        if not longest:
            return held.new_zeros(self.num_rows, 0, held.shape[2])
        return held[self.table[:, 0, :1].clamp(min=0), slots.clamp(min=0)]

    def ask_ahead(self) -> None:
        """See ``RowStore``: only prompts write here, and take their pages themselves."""

    def pages_to_list(self) -> int:
        """See ``RowStore``: none, for nothing is attended here."""
        return 0

    @contextlib.contextmanager
    def fixed(self, pages: int) -> Iterator[None]:
        """See ``RowStore``: rows that go on by a token of their own remember nothing."""
        if self.any_held():
            self.truncate(torch.zeros_like(self.lengths))
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def replace(self, inputs: Tensor, counts: Tensor, rows: Tensor) -> None:
        """Keep the last ``counts (B,)`` of ``inputs (B, n, hidden)`` in the rows ``(B,)`` marked, and nothing older."""
        self.truncate(self.lengths.masked_fill(rows[:, None], 0))
        keep = torch.arange(inputs.shape[1], device=rows.device) >= inputs.shape[1] - counts[:, None]
        keep = (keep & rows[:, None]).unsqueeze(1)  # (B, 1, n)
        self.write({"inputs": inputs.unsqueeze(1)}, keep.cumsum(-1) - 1, keep)


@dataclass(frozen=True)
class EndlessWindow:
    """A cache of constant size: the first tokens of a row and its latest ones (StreamingLLM, arXiv 2309.17453).

    Attributes:
        sink: First tokens.
        recent: Latest tokens, the current one included.
    """

    sink: int
    recent: int

    @property
    def capacity(self) -> int:
        """Tokens that fit; while they do, nothing differs from an unlimited cache."""
        return self.sink + self.recent


class LCKVCacheLayer(KVCacheLayer):
    """What one layer keeps: a part of the paged store, a ring, pending inputs, or nothing.

    Args:
        stores: Those that this layer accounts for; the paged store belongs to its first owner.
        rows: Any store of the cache, to count rows by.
        num_heads: Key-value heads.
        pages: The paged store, where this layer owns a part of it.
        ring: Its ring, where it has one.
        pending: Pending inputs of the cyclic stage that begins here.
        endless: What the rings of an endless cache keep.
    """

    def __init__(
        self,
        stores: list[RowStore],
        rows: RowStore,
        num_heads: int,
        pages: PagedStore | None,
        ring: RingStore | PagedRing | None,
        pending: PendingInputs | None,
        endless: EndlessWindow | None,
    ) -> None:
        super().__init__(*stores)
        self.rows, self.num_heads = rows, num_heads
        self.pages, self.ring, self.pending, self.endless = pages, ring, pending, endless

    def kv_tokens(self) -> Tensor:
        """See ``KVCacheLayer``; 0 for a layer that reads another's."""
        if self.pages is not None:
            return self.pages.lengths
        if isinstance(self.ring, PagedRing):
            return self.ring.pages.lengths
        if self.ring is not None:
            kept = self.ring["tokens"].clamp(max=self.ring.sink + self.ring.recent)
            return kept[:, None].expand(-1, self.num_heads)
        device = self.rows.placement.device
        return torch.zeros(self.rows.num_rows, self.num_heads, dtype=torch.long, device=device)


def build_layers(
    settings: LCKV,
    host_config: PreTrainedConfig,
    placements: list[Placement],
    sink: int | None = None,
    recent: int | None = None,
) -> list[LCKVCacheLayer]:
    """Empty cache layers of a model.

    Args:
        settings: The method.
        host_config: The host's configuration.
        placements: Where the tensors of each layer lie.
        sink: First tokens that an endless cache keeps.
        recent: Latest tokens that it keeps; None for a cache without end.

    Raises:
        ValueError: Layers lie on several devices, ``sink`` comes without ``recent``, or an endless cache would show
            layers with a sliding window more than that.
    """
    if len({str(placement.device) for placement in placements}) > 1:
        raise ValueError("layers that share keys and values must lie on one device; load the model without device_map")
    if recent is None and sink is not None:
        raise ValueError("an endless cache needs recent=, the number of latest tokens to keep, beside sink=")
    endless = None if recent is None else EndlessWindow(sink or 0, recent)
    keys, values = settings.maps(len(placements))
    if endless is not None and any(keys.sliding) and settings.sliding_window < endless.capacity:
        raise ValueError(
            f"layers marked 's' see {settings.sliding_window} tokens and this endless cache keeps {endless.capacity}; "
            "let sink + recent be no more than sliding_window"
        )
    heads, head_dim = common_key_value_shape(host_config)
    paged = {
        f"{name}.{owner}": head_dim
        for name, kv_map in (("keys", keys), ("values", values))
        for owner in kv_map.owners
        if endless is None and not kv_map.sliding[owner]
    }
    together = placements[0].shared_by(len(placements))
    pages = PagedStore(heads, paged, settings.page_size, together) if paged else None
    pending = _pending(settings, host_config, placements[0])
    rings = {
        owner: _ring(settings, keys, owner, endless, (heads, head_dim), placements[owner])
        for owner in sorted({*keys.owners, *values.owners})
        if endless is not None or keys.sliding[owner]
    }
    rows: RowStore = pages if pages is not None else _stores(next(iter(rings.values())))[0]
    layers: list[LCKVCacheLayer] = []
    uncounted = pages
    for index in range(len(placements)):
        part = pages if any(f"{name}.{index}" in paged for name in ("keys", "values")) else None
        ring, inputs = rings.get(index), pending.get(index)
        shared = uncounted if part is not None else None
        stores = [store for store in (shared, *_stores(ring), inputs) if store is not None]
        uncounted = None if part is not None else uncounted
        layers.append(LCKVCacheLayer(stores, rows, heads, part, ring, inputs, endless))
    return layers


def _ring(
    settings: LCKV,
    keys: KVMap,
    owner: int,
    endless: EndlessWindow | None,
    shape: tuple[int, int],
    placement: Placement,
) -> RingStore | PagedRing:
    """What an owner keeps of a text that goes on: its latest tokens, and in an endless cache its first ones too."""
    if endless is not None:
        return RingStore(*shape, endless.recent, endless.sink, placement)
    iterates = any(stage.cyclic and stage.first <= owner <= stage.last for stage in keys.stages())
    # A block that is read again must still find what came before it.
    kept = settings.sliding_window + (settings.prefill_block if iterates else 0)
    return PagedRing(*shape, kept, settings.page_size, placement)


def _stores(ring: RingStore | PagedRing | None) -> list[RowStore]:
    if isinstance(ring, PagedRing):
        return ring.stores
    return [] if ring is None else [ring]


def _pending(settings: LCKV, host_config: PreTrainedConfig, placement: Placement) -> dict[int, PendingInputs]:
    """A store for every cyclic stage, by its first layer; none where blocks come out exact however they are cut."""
    if settings.passes >= settings.prefill_block and settings.prefill_tolerance is None:
        return {}
    stages = settings.maps(host_config.num_hidden_layers)[0].stages()
    return {
        stage.first: PendingInputs(host_config.hidden_size, settings.prefill_block, placement)
        for stage in stages
        if stage.cyclic
    }
