"""Forward passes over some rows of the cache where they lie, and the rows themselves."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.cache.rows import CacheSnapshot
from kvtrain.inference.engine.scheduler import Chunk
from kvtrain.models.compiled import CompiledStep
from kvtrain.models.hosts import key_value_shapes

logger = logging.getLogger("kvtrain")
_ANY_TOKENS = 1 << 40  # more than any row gets


@dataclass(eq=False)
class CacheRow:
    """A row of the cache.

    Attributes:
        number: Where it lies; changes when empty rows before it are dropped.
    """

    number: int


class CacheRows:
    """Rows of a model's cache as the scheduler wants them; see ``RowPool``.

    Args:
        cache: From ``make_cache``, with a budget; empty.
    """

    def __init__(self, cache: KVCache) -> None:
        assert cache.budget is not None and not cache.num_rows
        self.cache = cache
        self._bytes = cache.budget
        self._rows: list[CacheRow] = []
        self._empty: list[CacheRow] = []

    @property
    def budget(self) -> int:
        """Bytes that rows may hold together."""
        return self._bytes.limit

    @property
    def cuts_prompts(self) -> bool:
        """See ``RowPool``."""
        return self.cache.cuts_prompts

    def end_prompts(self, rows: Sequence[CacheRow]) -> None:
        """Some rows have read their prompts to the end."""
        self.cache.end_prompt([row.number for row in rows])

    def take(self) -> CacheRow:
        """An empty row."""
        if self._empty:
            return self._empty.pop()
        row = CacheRow(self.cache.admit(1)[0])
        self._rows.append(row)
        return row

    def release(self, row: CacheRow) -> None:
        """Forget what a row holds; it may be taken again."""
        self.cache.clear_rows([row.number])
        self._empty.append(row)

    def trim(self) -> bool:
        """Drop empty rows, which hold their tables and states all the same; whether there were any."""
        if not self._empty:
            return False
        self.cache.free_rows([row.number for row in self._empty])
        gone, self._empty = set(map(id, self._empty)), []
        self._rows = [row for row in self._rows if id(row) not in gone]
        for number, row in enumerate(self._rows):
            row.number = number
        return True

    def copy(self, source: CacheRow) -> CacheRow:
        """A new row that holds what another one does."""
        target = self.take()
        try:
            self.cache.copy_row(source.number, target.number)
        except ValueError:
            self._empty.append(target)
            raise
        return target

    def rollback(self, row: CacheRow, tokens: int) -> None:
        """Forget the latest tokens of a row."""
        with self.cache.rows([row.number]):
            self.cache.rollback(tokens)

    def snapshot(self, row: CacheRow) -> CacheSnapshot:
        """What a row holds, on the host."""
        return self.cache.snapshot_row(row.number).to("cpu")

    def restore(self, snapshot: CacheSnapshot) -> CacheRow:
        """A new row that holds what a snapshot saw."""
        row = self.take()
        try:
            self.cache.restore_row(row.number, snapshot)
        except ValueError:
            self._empty.append(row)
            raise
        return row

    def row_bytes(self, rows: Sequence[CacheRow]) -> list[int]:
        """Bytes that each of some rows holds."""
        held = self.cache.row_bytes().tolist()
        return [held[row.number] for row in rows]

    def bytes_for(self, rows: Sequence[CacheRow], tokens: int) -> int:
        """Bytes that the next tokens of each of some rows take at most."""
        with self.cache.rows([row.number for row in rows]):
            return self.cache.bytes_for(tokens)

    def most_bytes(self) -> float:
        """Bytes that a row comes to at most, however many tokens it gets; infinite where that is above the budget."""
        most = self.cache.bytes_for(_ANY_TOKENS, 1)
        return most if most <= self.budget else math.inf


class Runner:
    """A model with the rows of its cache.

    Args:
        model: In evaluation mode.
        budget: Bytes.
        compiled_rows: Decoding passes over so many rows at most are compiled.
        page_size: Slots in a page; None is the model's own.

    Raises:
        ValueError: The model's cache has no pages.
    """

    def __init__(self, model: Any, budget: int, compiled_rows: int = 0, page_size: int | None = None) -> None:
        self.model = model
        self.rows = CacheRows(model.make_cache(budget, preallocate=True, page_size=page_size))
        self._compiled_rows, self._step = compiled_rows, None
        if compiled_rows:
            self._step = CompiledStep(model, self.rows.cache)
            if not self._step.eager:
                logger.info(
                    "decoding passes over at most %d rows are compiled; the first ones take long", compiled_rows
                )
        self.plain_token_bytes = _plain_token_bytes(model)

    @property
    def compilations(self) -> int:
        """Graphs that have been made of decoding passes so far."""
        return 0 if self._step is None else self._step.compilations

    @torch.no_grad()
    def run(self, batch: Sequence[Chunk], prefill: bool) -> Tensor:
        """Feed every sequence its next tokens; logits ``(B, V)`` behind the last one of each.

        Args:
            batch: Tokens a row; shorter ones are padded at the left.
            prefill: Whether they are parts of prompts, even where they are single tokens.

        Raises:
            CacheFullError: They may not fit into the budget; nothing has changed.
        """
        order = sorted(range(len(batch)), key=lambda place: batch[place].sequence.row.number)
        batch = [batch[place] for place in order]  # where all rows go on they are not even narrowed
        width = max(count for _, count in batch)
        ids = [[0] * (width - count) + list(s.tokens(s.seen, s.seen + count)) for s, count in batch]
        mask = None
        if any(count < width for _, count in batch):
            mask = torch.tensor([[0] * (width - count) + [1] * count for _, count in batch], device=self.model.device)
        tokens = torch.tensor(ids, device=self.model.device)
        with self.rows.cache.rows([sequence.row.number for sequence, _ in batch]):
            if self._step is not None and width == 1 and not prefill and len(batch) <= self._compiled_rows:
                logits: Tensor = self._step(tokens)
            else:
                output = self.model(
                    tokens,
                    attention_mask=mask,
                    past_key_values=self.rows.cache,
                    prefill=prefill,
                    logits_to_keep=1,
                )
                logits = output.logits[:, -1]
        return logits[torch.tensor(order, device=logits.device).argsort()]

    def kept_tokens(self, rows: Sequence[CacheRow]) -> Tensor:
        """Entries kept of some rows, ``(layers, rows, H_kv)``, with -1 for heads that a layer does not have."""
        kept = [layer.kv_tokens().cpu() for layer in self.rows.cache.layers]
        most = max(tokens.shape[1] for tokens in kept)
        index = torch.tensor([row.number for row in rows], dtype=torch.long)
        padded = [torch.nn.functional.pad(tokens, (0, most - tokens.shape[1]), value=-1) for tokens in kept]
        return torch.stack(padded)[:, index]


def _plain_token_bytes(model: Any) -> int:
    """Bytes that a token takes where every layer keeps its keys and values in every head."""
    host = getattr(model.config, "host_config", None)
    if host is None:
        channels = model.config.num_hidden_layers * model.config.hidden_size
    else:
        channels = sum(heads * head_dim for heads, head_dim in key_value_shapes(host))
    return 2 * int(channels) * int(model.dtype.itemsize)
