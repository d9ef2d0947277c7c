"""How a layer reads a cache while new tokens go in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvtrain.cache.paged import PagedStore
from kvtrain.cache.ring import PagedRing, RingStore
from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.memo import Memo
from kvtrain.kernels.page_runs import PageRuns
from kvtrain.kernels.paged_attention import goes_by_pages, paged_attention
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.attention import Angles
from kvtrain.models.lckv.attention import KeyValue, SharedAttention
from kvtrain.models.lckv.cache import EndlessWindow, LCKVCacheLayer
from kvtrain.models.ordering import take_slots
from kvtrain.models.windows import attend_cache_and_window

# Keys (B, H_kv, S, D), values, and the position (B, S) of the token in each slot, -1 where there is none.
RingContent = tuple[Tensor, Tensor, Tensor]

_KEPT_BYTES = 16 * 2**20  # of keys and values that passes over the same tokens read, for each pair of owners


@dataclass(frozen=True, eq=False)
class CacheView(Memo):
    """What is stored of the tokens before the new ones, and where the new ones go.

    Attributes:
        layers: Of the cache.
        past: ``(B,)`` tokens of each row before the new ones.
        valid: ``(B, n)`` real ones among the new tokens; in every row the padding stands before them.
        write: ``(B, n)`` which of them are stored; None in a pass whose results do not count.
        angles: Cosines and sines ``(B, n, D)`` of the new tokens.
        slot_angles: Those of an endless cache's slots ``(1, capacity, D)``.
        rings: Content of the rings before this forward pass, by owner, where new tokens may have overwritten some.
        single: Whether every row has one token, a real one, for which the cache has taken what it needs.
        past_runs: Pages of the tokens before the new ones by whose keys and values they are, where passes follow each
            other over the same new tokens: what lies before them stays as it is; None for a single pass.
    """

    layers: list[LCKVCacheLayer]
    past: Tensor
    valid: Tensor
    write: Tensor | None
    angles: Angles
    slot_angles: Angles | None = None
    rings: dict[int, RingContent] | None = None
    single: bool = False
    past_runs: dict[tuple[int, int], PageRuns] | None = None

    @property
    def _documents(self) -> Documents:
        """Real tokens see real ones among the new tokens; one object for all layers and passes over them."""
        return self.keep("documents", lambda: Documents(self.valid.long()))

    @property
    def _slots(self) -> Tensor:
        """Of the new tokens in the paged store, ``(B, H_kv, n)``: one tensor, by which it knows that it was asked."""
        return self.keep("slots", lambda: self._by_head((self.past[:, None] + self.valid.cumsum(-1) - 1)[:, None]))

    @property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        """Slots ``(B, H_kv)`` before the new tokens, and with a last one."""

        def make() -> tuple[Tensor, Tensor]:
            return self._by_head(self.past[:, None]), self._by_head((self.past + self.valid[:, -1])[:, None])

        return self.keep("lengths", make)

    def _by_head(self, tensor: Tensor) -> Tensor:
        """``(B, 1, ...)`` the same for every head, ``(B, H_kv, ...)``."""
        return tensor.expand(-1, self.layers[0].num_heads, *tensor.shape[2:])

    def attend(
        self, module: SharedAttention, query: Tensor, key: Tensor | None, value: Tensor | None, key_value: KeyValue
    ) -> Tensor:
        """Store what a layer has made, and attend.

        Args:
            module: The layer's attention.
            query: ``(B, H, n, D)``, rotated.
            key: ``(B, H_kv, n, D)`` of the new tokens in the layer that it reads; None: they are not there yet.
            value: Likewise.
            key_value: What the layer owns of the new tokens.

        Returns:
            ``(B, H, n, D)``; zeros where a token sees nothing.
        """
        # Under autocast what is held, and read again, is wider than what a layer makes.
        new = None if key is None or value is None else (key.to(query.dtype), value.to(query.dtype))
        if self.write is not None:
            self._store(module.layer_idx, key_value, self.write)
        layer = self.layers[module.key_layer]
        one = query.shape[2] == 1  # which has been stored by now, if its layer's keys and values are there at all
        itself = one and new is not None and not module.strict
        seen = self.past + (self.valid[:, -1] if itself else 0)
        if layer.pages is not None:
            return self._attend_pages(module, query, None if one else new, self._lengths[itself])
        if layer.endless is not None:
            return self._attend_endless(module, query, None if one else new, seen, layer.endless)
        if one:
            return self._attend_ring(module, query, seen, itself)
        return self._attend_window(module, query, new)

    def _store(self, owner: int, key_value: KeyValue, write: Tensor) -> None:
        key, value = key_value
        layer = self.layers[owner]
        if layer.ring is not None and (key is not None or value is not None):
            some = key if key is not None else value
            assert some is not None
            # A layer that owns one of the two still has a ring of both.
            key = torch.zeros_like(some) if key is None else key
            value = torch.zeros_like(some) if value is None else value
            turned = _turn_back(key, self.angles) if layer.endless is not None else key
            layer.ring.write(turned, value, None if self.single else write)
        elif layer.pages is not None:
            named = {f"keys.{owner}": key, f"values.{owner}": value}
            states = {name: state for name, state in named.items() if state is not None}
            if states:
                keep = None if self.single else write[:, None].expand(-1, layer.num_heads, -1)
                layer.pages.write(states, self._slots, keep)

    def _attend_pages(
        self, module: SharedAttention, query: Tensor, new: tuple[Tensor, Tensor] | None, lengths: Tensor
    ) -> Tensor:
        """The first ``lengths (B, H_kv)`` slots, and the new tokens beside them where they are given."""
        pages = self.layers[module.key_layer].pages
        assert pages is not None
        parts = []
        if new is not None:
            parts.append(self._attend_new(module, query, new))
        if pages.table.shape[2]:
            keys = pages.pool.slots[f"keys.{module.key_layer}"]
            values = pages.pool.slots[f"values.{module.value_layer}"]
            table, layout, runs = pages.table, None, None
            if self.past_runs is not None:
                runs = self._past_runs(module, table, pages.page_size)
            elif goes_by_pages(query, table, pages.page_size):
                layout = pages.layout()
            parts.append(paged_attention(query, keys, values, table, lengths, module.scaling, layout=layout, runs=runs))
        return _merge(parts, query)

    def _past_runs(self, module: SharedAttention, table: Tensor, page_size: int) -> PageRuns:
        """Those of one owner's keys and another's values, which all layers and passes that read them share."""
        assert self.past_runs is not None
        owners = module.key_layer, module.value_layer
        if owners not in self.past_runs:
            lengths = self._lengths[0].flatten()
            self.past_runs[owners] = PageRuns(table.flatten(0, 1), lengths, page_size, _KEPT_BYTES)
        return self.past_runs[owners]

    def _attend_new(self, module: SharedAttention, query: Tensor, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The new tokens over themselves."""
        return attention(query, *new, strict=module.strict, documents=self._documents, scale=module.scaling)

    def _attend_ring(self, module: SharedAttention, query: Tensor, seen: Tensor, itself: bool) -> Tensor:
        """One new token a row over the ring, where it lies if all that lies there is in the token's window."""
        ring = self.layers[module.key_layer].ring
        whole = itself and isinstance(ring, PagedRing) and ring.recent == module.window
        if whole and module.key_layer == module.value_layer and not torch.is_grad_enabled():
            assert isinstance(ring, PagedRing)
            return _attend_held(module, query, ring.pages)
        keys, values, positions = self._ring(module)
        assert module.window is not None
        lowest = self.past - module.window + 1
        hidden = (positions < lowest[:, None].clamp(min=0)) | (positions >= seen[:, None])
        return _attend_slots(module, query, keys, values, hidden)[0]

    def _attend_window(self, module: SharedAttention, query: Tensor, new: tuple[Tensor, Tensor] | None) -> Tensor:
        """Many new tokens, each over a window of its own: what is held in order, then the new ones."""
        keys, values, positions = self._ring(module)
        positions = positions.masked_fill(positions >= self.past[:, None], -1)  # those are read again
        order = positions.argsort(1)
        held = (take_slots(keys, order), take_slots(values, order), positions.gather(1, order))
        unseen = query.new_zeros(*keys.shape[:2], self.valid.shape[1], keys.shape[3])
        assert module.window is not None
        return attend_cache_and_window(
            query,
            (unseen, unseen) if new is None else new,
            held,
            self.valid,
            window=module.window,
            visible=None if new is not None else torch.zeros_like(self.valid),
            strict=module.strict,
            scale=module.scaling,
        )[0]

    def _attend_endless(
        self,
        module: SharedAttention,
        query: Tensor,
        new: tuple[Tensor, Tensor] | None,
        seen: Tensor,
        endless: EndlessWindow,
    ) -> Tensor:
        """Sinks and latest tokens, as if they stood side by side: positions count what is there."""
        keys, values, positions = self._ring(module)
        assert self.slot_angles is not None
        gone = (self.past + 1 - endless.capacity).clamp(min=0)[:, None]  # (B, 1) tokens between sinks and window
        places = torch.where(positions < endless.sink, positions, positions - gone)
        hidden = (places < 0) | (positions >= seen[:, None]) | ((places < endless.sink) & (positions >= endless.sink))
        angles = tuple(angle[0][places.clamp(0, endless.capacity - 1)] for angle in self.slot_angles)
        parts = [_attend_slots(module, query, apply_rotary(keys, *angles), values, hidden)]
        if new is not None:  # nothing has been dropped yet
            parts.append(self._attend_new(module, query, new))
        return _merge(parts, query)

    def _ring(self, module: SharedAttention) -> RingContent:
        """Keys of one owner, values of another, and where they stand."""
        if self.rings is not None:
            keys, _, positions = self.rings[module.key_layer]
            return keys, self.rings[module.value_layer][1], positions
        key_ring, value_ring = self.layers[module.key_layer].ring, self.layers[module.value_layer].ring
        assert key_ring is not None and value_ring is not None
        keys, values, positions = _read(key_ring)
        return keys, values if value_ring is key_ring else _read(value_ring)[1], positions


def copied(ring: RingStore | PagedRing) -> RingContent:
    """What a ring holds now, whatever is written later."""
    keys, values, positions = ring.gather()
    return (keys.clone(), values.clone(), positions) if isinstance(ring, RingStore) else (keys, values, positions)


def _read(ring: RingStore | PagedRing) -> RingContent:
    """Where a backward pass may come, slots are written again before it does."""
    return copied(ring) if torch.is_grad_enabled() else ring.gather()


def _attend_held(module: SharedAttention, query: Tensor, pages: PagedStore) -> Tensor:
    """One query a row over every slot that is in use."""
    if not pages.table.shape[2]:
        return torch.zeros_like(query)
    layout = pages.layout() if goes_by_pages(query, pages.table, pages.page_size) else None
    keys, values = pages.pool.slots["keys"], pages.pool.slots["values"]
    return paged_attention(query, keys, values, pages.table, pages.lengths, module.scaling, layout=layout)[0]


def _attend_slots(
    module: SharedAttention, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """All queries over the slots that are not ``hidden (B, S)``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = torch.zeros(hidden.shape, dtype=wide, device=query.device).masked_fill_(hidden, float("-inf"))
    bias = bias[:, None].expand(-1, keys.shape[1], -1)
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    return attention(query, keys, values, key_bias=bias, causal=False, scale=module.scaling)


def _merge(parts: list[tuple[Tensor, Tensor]], query: Tensor) -> Tensor:
    if not parts:
        return torch.zeros_like(query)
    return merge_attention(parts)[0] if len(parts) > 1 else parts[0][0]


def _turn_back(key: Tensor, angles: Angles) -> Tensor:
    """Keys ``(B, H, n, D)`` as they were before they were rotated (and scaled, under YaRN)."""
    cos, sin = angles
    squared = (cos * cos + sin * sin).unsqueeze(1)
    return (apply_rotary(key, cos, -sin) / squared).to(key.dtype)
