"""What every cache here is: layers that know their bytes and their rows."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.cache.budget import ByteBudget
from kvtrain.cache.generating import GeneratingCache
from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.open_prompts import OpenPrompts
from kvtrain.cache.rows import CacheSnapshot, bookkeeping, peak_growth
from kvtrain.cache.state import StateStore


class KVCache(GeneratingCache):
    """A model's cache; ``model.make_cache()`` builds it.

    Rows are admitted by the first forward pass or by ``admit``, and may join and leave between any two passes.

    Args:
        layers: One for each layer of the model.
        budget: Limit on bytes, which the layers' stores were given too.

    Attributes:
        seen: Positions that went by, padding included: the logical length of ``generate``.
        stores: All that holds something, of the layers and of the cache itself.
    """

    layers: list[KVCacheLayer]  # type: ignore[assignment]

    def __init__(self, layers: Sequence[KVCacheLayer], budget: ByteBudget | None = None) -> None:
        super().__init__(layers=list(layers))
        self.budget = budget
        self.seen, self._chosen = 0, False  # whether a pass is over some rows alone
        stores = [store for layer in layers for store in layer.stores]
        placement, cuts = stores[0].placement, any(layer.cuts_prompts for layer in layers)
        self._rows = StateStore({"tokens": ((), torch.long)}, placement)
        self._open_prompts = OpenPrompts(placement) if cuts else None
        self.stores = [*stores, self._rows, *filter(None, [self._open_prompts])]

    @property
    def num_rows(self) -> int:
        """Rows, B."""
        return self._rows.num_rows

    @property
    def tokens(self) -> Tensor:
        """Real tokens that each row has seen, ``(B,)``: the position of its next one."""
        return self._rows["tokens"]

    @property
    def cuts_prompts(self) -> bool:
        """Whether prompts stay whole until ``end_prompt``, so that what a row holds depends on where its own ended."""
        return self._open_prompts is not None

    def kv_bytes(self) -> int:
        """Bytes really allocated, over all layers; pages that are reserved count from when they are taken."""
        return sum(store.num_bytes() for store in self.stores)

    def free_bytes(self) -> int:
        """Those of ``kv_bytes`` that hold nothing at present (spare pages)."""
        return sum(store.free_bytes() for store in self.stores)

    def held_bytes(self) -> int:
        """Those of ``kv_bytes`` that hold something."""
        return self.kv_bytes() - self.free_bytes()

    def reserved_bytes(self) -> int:
        """Bytes that a cache with ``preallocate`` has reserved for pages and rows, whoever has them."""
        return sum(store.reserved_bytes() for store in self.stores)

    def row_bytes(self) -> Tensor:
        """Those of ``held_bytes`` that each row holds, ``(B,)`` on the CPU."""
        return torch.stack([store.row_bytes().cpu() for store in self.stores]).sum(0)

    def kv_tokens(self) -> Tensor:
        """Entries kept, ``(layers, B, H_kv)``; 0 where a layer has fewer heads than another."""
        kept = [layer.kv_tokens() for layer in self.layers]
        most = max(tokens.shape[1] for tokens in kept)
        return torch.stack([pad(tokens, (0, most - tokens.shape[1])) for tokens in kept])

    def mean_kv_tokens(self) -> Tensor:
        """Entries that a head of a row keeps, in the mean over all heads of all layers, ``(B,)`` float64."""
        return torch.cat([layer.kv_tokens() for layer in self.layers], 1).double().mean(1)

    def bytes_for(self, tokens: int, rows: int = 0) -> int:
        """Bytes that the next ``tokens`` of every row may need at most, spare pages used up first.

        Args:
            tokens: New tokens a row; where a pass is over some rows, of these alone.
            rows: New rows besides those that are here.
        """
        return sum(store.bytes_for(tokens, rows) for store in self.stores)

    @contextlib.contextmanager
    def rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Let forward passes within this context be over some rows, where they lie; all others stay as they are.

        Inside, the cache has these rows alone, in this order: the input's rows are theirs, ``bytes_for`` is of their
        tokens, and ``rollback`` goes. Rows may neither come, leave nor change places there.

        Args:
            rows: Their numbers.

        Raises:
            ValueError: There is no such row, none at all, one twice, or some are chosen already.
        """
        self._check_rows(rows)
        if not rows or len(set(rows)) < len(rows):
            raise ValueError(f"a pass over some rows needs at least one, and each once, not {list(rows)}")
        if list(rows) == list(range(self.num_rows)):
            yield
            return
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        for store in self.stores:
            store.narrow(index.to(store.placement.device))
        self._chosen = True
        try:
            yield
        finally:
            self._chosen = False
            for store in self.stores:
                store.widen()

    @bookkeeping
    def prepare(self, batch: int, tokens: int, answers: Callable[[], Tensor] | None = None) -> None:
        """Called before a forward pass: admits the rows of the first one, and checks what could fail half-way.

        Args:
            batch: Rows of the input.
            tokens: Tokens of the input.
            answers: Rows ``(batch,)`` with new tokens that are part of no prompt, which ends the prompts before them;
                asked for where that matters. None: all rows.

        Raises:
            ValueError: The input has another number of rows than the cache.
            CacheFullError: The budget may not hold the new tokens.
        """
        fresh = self.num_rows == 0
        if not fresh and batch != self.num_rows:
            counts = f"the input has {batch} rows and the cache {self.num_rows}"
            raise ValueError(f"{counts}; use admit, select_rows or join, or start with model.make_cache()")
        if self._open_prompts is not None and not fresh:
            self._end_prompts(torch.ones(batch, dtype=torch.bool) if answers is None else answers())
        if self.budget is not None and (fresh or tokens != 1):
            self._require(self.bytes_for(tokens, batch if fresh else 0), f"{tokens} tokens in {batch} rows")
        if fresh:
            self.admit(batch)
        if tokens == 1:
            self._take_ahead(f"1 token in {batch} rows")

    def _take_ahead(self, purpose: str) -> None:
        """Let every store take what one more token of every row may need, after a single question to the device."""
        asked = [(store, question) for store in self.stores if (question := store.ask_ahead()) is not None]
        if asked:
            device = asked[0][1].device
            answers = torch.stack([question.to(device) for _, question in asked]).tolist()
            pairs = [(store, answer) for (store, _), answer in zip(asked, answers, strict=True)]
            self._require(sum(store.bytes_ahead(answer) for store, answer in pairs), purpose)
            for store, answer in pairs:
                store.take_ahead(answer)

    @contextlib.contextmanager
    def fixed(self) -> Iterator[tuple[int, int]]:
        """Let one token of every row meet tensors of shapes that seldom change; ``prepare`` comes before it.

        Inside, a layer may write a token a row, a real one, and attend it, and nothing else may happen.

        Returns:
            What all of these shapes follow from: the number of rows, and the power of two to which every store's list
            of pages is filled up.

        Raises:
            ValueError: The cache's pages are not reserved.
        """
        pages = max(store.pages_to_list() for store in self.stores)
        with contextlib.ExitStack() as stack:
            for store in self.stores:
                stack.enter_context(store.fixed(pages))
            yield self.num_rows, pages

    @bookkeeping
    def advance(self, valid: Tensor, prefill: Tensor | None = None) -> None:
        """Called after a forward pass: counts its tokens.

        Args:
            valid: ``(B, n)`` real ones.
            prefill: ``(B,)`` rows of whose prompts they were a part; None: of none.
        """
        self.seen += valid.shape[1]
        self._rows["tokens"] = self.tokens + valid.sum(1)
        if self._open_prompts is not None and prefill is not None:
            self._open_prompts.go_on(prefill)

    def end_prompt(self, rows: Sequence[int] | None = None) -> None:
        """Say that some rows, all by default, have read their prompts to the end.

        Layers that keep a prompt whole until then cut it. A token that a row gets as an answer says the same; said
        here, memory is free before it comes.

        Args:
            rows: Their numbers, within ``rows(...)`` among the chosen ones.

        Raises:
            CacheFullError: What is cut may need more room elsewhere than the budget has; nothing has changed.
        """
        if self._open_prompts is not None:
            chosen = torch.zeros(self.num_rows, dtype=torch.bool)
            chosen[slice(None) if rows is None else list(rows)] = True
            self._end_prompts(chosen)

    def _end_prompts(self, rows: Tensor) -> None:
        """As ``end_prompt``, of the rows ``(B,)``."""
        assert self._open_prompts is not None
        ended = self._open_prompts.among(rows)
        if ended is not None:
            self._require(self.bytes_for(0), "the end of a prompt")
            self._open_prompts.end(ended)
            for layer in self.layers:
                layer.end_prompt(ended, self.layers)

    def admit(self, count: int) -> range:
        """Add empty rows at the end; they may wait, fed with padding alone, or start at once.

        Returns:
            Their numbers.

        Raises:
            ValueError: ``count`` is negative.
            CacheFullError: The budget does not allow them.
        """
        if count < 0:
            raise ValueError(f"cannot admit {count} rows; free_rows and select_rows drop some")
        self._check_whole()
        first = self.num_rows
        self._require(self.bytes_for(0, count), f"{count} new rows")
        for store in self.stores:
            store.admit(count)
        return range(first, first + count)

    def select_rows(self, indices: Tensor) -> None:
        """Keep, repeat, reorder or drop rows: the new row ``i`` is the old row ``indices[i]``, ``(B_new,)``.

        Raises:
            ValueError: There is no such row.
            CacheFullError: The budget does not allow the repeated ones; nothing has changed.
        """
        self._check_rows(indices.tolist())
        if torch.equal(indices, torch.arange(self.num_rows, device=indices.device)):
            return
        if self.budget is not None:
            self._require(sum(store.bytes_to_select(indices) for store in self.stores), "repeated rows")
        for store in self.stores:
            store.select_rows(indices)

    def free_rows(self, rows: Sequence[int]) -> None:
        """Drop rows and give their memory back; later rows move up.

        Raises:
            ValueError: There is no such row.
        """
        self._check_rows(rows)
        kept = [row for row in range(self.num_rows) if row not in set(rows)]
        self.select_rows(torch.tensor(kept, dtype=torch.long, device=self.tokens.device))

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Forget what some rows hold and give its memory back; they stay, empty, and no other row gets a new number.

        Raises:
            ValueError: There is no such row.
        """
        self._check_rows(rows)
        if rows:
            index = torch.tensor(sorted(set(rows)), dtype=torch.long, device=self.tokens.device)
            for store in self.stores:
                store.clear_rows(index.to(store.placement.device))

    def copy_row(self, source: int, target: int) -> None:
        """Let one row hold what another one does, as it stands; what it held before is forgotten.

        Raises:
            ValueError: There is no such row.
            CacheFullError: The budget does not allow it; nothing has changed.
        """
        self._check_rows([source, target])
        if source == target:
            return
        if self.budget is not None:
            self._require(sum(store.bytes_to_copy(source, target) for store in self.stores), "a copied row")
        for store in self.stores:
            store.copy_row(source, target)

    def join(self, other: Self, *, move: bool = False) -> None:
        """Copy the rows of another cache of the same model to the end, as they stand.

        Args:
            other: The other cache.
            move: Empty it, store by store, so that no row is held twice as a whole.

        Raises:
            ValueError: The other cache is this one, or was made with other options; nothing has changed.
            CacheFullError: The budget does not allow them; nothing has changed.
        """
        self._check_whole()
        if other is self:
            raise ValueError("a cache cannot join itself; repeat its rows with batch_repeat_interleave")
        if [store.form() for store in self.stores] != [store.form() for store in other.stores]:
            raise ValueError("these caches keep different things; give both the same model and options of make_cache")
        pairs = list(zip(self.stores, other.stores, strict=True))
        growth = [mine.bytes_to_join(theirs) for mine, theirs in pairs]
        shared = move and other.budget is self.budget
        self._require(peak_growth(growth, pairs) if shared else sum(growth), f"{other.num_rows} joining rows")
        for mine, theirs in pairs:
            mine.join(theirs)
            if move:
                theirs.reset()
        self.seen = max(self.seen, other.seen)
        if move:
            other.seen = 0

    def snapshot_row(self, row: int) -> CacheSnapshot:
        """A copy of one row, to go back to.

        Raises:
            ValueError: There is no such row.
        """
        self._check_rows([row])
        return CacheSnapshot([store.snapshot_row(row) for store in self.stores], self.seen)

    def restore_row(self, row: int, snapshot: CacheSnapshot) -> None:
        """Put a row back to a snapshot of this cache or of another one of the same model.

        A cache of one row also counts again from there. In one of several rows the logical length stays, and the
        row's own position goes back.

        Raises:
            ValueError: There is no such row.
            CacheFullError: The budget does not allow it; nothing has changed.
        """
        self._check_rows([row])
        pairs = list(zip(self.stores, snapshot.stores, strict=True))
        self._require(sum(store.bytes_to_restore(row, state) for store, state in pairs), "a snapshot")
        for store, state in pairs:
            store.restore_row(row, state)
        if self.num_rows == 1:
            self.seen = snapshot.seen

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self._check_whole()
        for store in self.stores:
            store.reset()
        self.seen = 0

    def rollback(self, tokens: int | Tensor) -> None:
        """Take back the latest tokens of every row, as if they had never come.

        The logical length goes back by the largest number.

        Args:
            tokens: How many, or ``(B,)`` how many of each row.

        Raises:
            ValueError: A row has seen fewer, or a layer no longer has what came before; nothing has changed.
        """
        past, wanted = self.tokens, torch.as_tensor(tokens, device=self.tokens.device)
        if wanted.is_floating_point() or wanted.shape not in ((), past.shape):
            raise ValueError(f"rollback takes a number, or one for each of {self.num_rows} rows, not {tokens}")
        largest = int(wanted.max()) if wanted.numel() else 0
        wanted = wanted.expand_as(past)
        if bool(((wanted < 0) | (wanted > past)).any()) or (largest and not self.num_rows):
            raise ValueError(f"rows that have seen {past.tolist()} tokens cannot be rolled back or cropped by {tokens}")
        for layer in self.layers:
            layer.check_rollback(wanted, past)
        for layer in self.layers:
            layer.rollback(wanted, past)
        self._rows["tokens"] = past - wanted
        self.seen = max(0, self.seen - largest)

    def _check_rows(self, rows: Sequence[int]) -> None:
        self._check_whole()
        if absent := [row for row in rows if not 0 <= row < self.num_rows]:
            raise ValueError(f"there is no row {absent[0]}; this cache has {self.num_rows}, counted from 0")

    def _check_whole(self) -> None:
        if self._chosen:
            raise ValueError("rows stay where they are while a pass is over some of them; leave cache.rows(...) first")

    def _require(self, num_bytes: int, purpose: str) -> None:
        """Ask the budget before any store changes, so that no layer is ahead of another.

        Raises:
            CacheFullError: It does not allow so many bytes more.
        """
        if self.budget is not None and num_bytes > 0:
            self.budget.require(num_bytes, purpose)
