"""Prompts are read, then answers decoded token by token: what a model would say at each, and what its cache takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.models.cache_size import row_bytes
from kvtrain.models.full import Full

PROMPT_CHUNK = 256  # tokens of a prompt that are read at a time


@dataclass(frozen=True)
class AnsweringBytes:
    """Bytes of the cache while answers are decoded, spare pages aside, beside those of ``Full`` after as many tokens.

    Attributes:
        kv_bytes_mean: Of a row, in the mean over all steps of the answers.
        kv_bytes_end: Of a row when the last token has been read, in the mean.
        kv_bytes_peak: Of a row, the most after any pass, those over the prompt included, in the mean over batches.
        kv_share_mean: Over all steps of the answers, as a share of ``Full``'s; None of a model that has no host.
        kv_share_end: After the last step, likewise.
        kv_share_peak: ``kv_bytes_peak`` as a share of ``Full``'s at the end.
    """

    kv_bytes_mean: float
    kv_bytes_end: float
    kv_bytes_peak: float
    kv_share_mean: float | None
    kv_share_end: float | None
    kv_share_peak: float | None


class AnsweringMeter:
    """Looks at caches while a model answers.

    Args:
        model: From ``open_model``.
    """

    def __init__(self, model: Any) -> None:
        host = getattr(model.config, "host_config", None)
        self._full: Callable[[int], int] | None = None if host is None else row_bytes(host, Full(), model.dtype)
        self._rows = self._end = self._full_end = self._peak = self._batch_peak = 0
        self._looks = self._held = self._full_held = 0  # looks: steps of answers, times rows

    def begin(self) -> None:
        """A batch of rows is about to be read into an empty cache."""
        self._batch_peak = 0

    def look(self, cache: Any, answering: bool) -> None:
        """A pass is over, of the answers or of the prompt."""
        held = cache.held_bytes()
        self._batch_peak = max(self._batch_peak, held)
        if answering:
            self._looks += cache.num_rows
            self._held += held
            self._full_held += self._full_bytes(cache)

    def end(self, cache: Any) -> None:
        """The batch is through."""
        self._rows += cache.num_rows
        self._end += cache.held_bytes()
        self._full_end += self._full_bytes(cache)
        self._peak += self._batch_peak

    def _full_bytes(self, cache: Any) -> int:
        """What ``Full`` would hold."""
        return 0 if self._full is None else sum(self._full(tokens) for tokens in cache.tokens.tolist())

    def result(self) -> AnsweringBytes:
        """Over all batches."""
        pairs = ((self._held, self._full_held), (self._end, self._full_end), (self._peak, self._full_end))
        shares = (held / full if full else None for held, full in pairs)
        return AnsweringBytes(self._held / self._looks, self._end / self._rows, self._peak / self._rows, *shares)


@torch.no_grad()
def decode_answers(
    model: Any, rows: Sequence[Tensor], prompts: Sequence[int], meter: AnsweringMeter
) -> tuple[Tensor, KVCache]:
    """Read the beginning of every row as its prompt, and feed the rest token by token, whatever the model would say.

    Args:
        model: From ``open_model``.
        rows: Token ids of each row, ``(T_b,)``.
        prompts: How many of them are its prompt: at least 1, and fewer than all.
        meter: Looks at the cache after every pass.

    Returns:
        Last hidden states ``(B, A, D)``: ``[b, i]`` is what ``rows[b][prompts[b] + i]`` is predicted from, anything
        where a row has ended before others; and the cache, in which all rows are whole.
    """
    ids, mask = pad_rows([row[end:] for row, end in zip(rows, prompts, strict=True)], model.device, left=False)
    meter.begin()
    beginnings = [row[:end] for row, end in zip(rows, prompts, strict=True)]
    last, cache = read_prompts(model, beginnings, lambda cache: meter.look(cache, answering=False))
    hidden, decoder = [last], model.get_decoder()
    for step in range(ids.shape[1]):
        part = slice(step, step + 1)
        kwargs = {"attention_mask": mask[:, part], "past_key_values": cache}
        hidden.append(decoder(ids[:, part], **kwargs).last_hidden_state[:, -1])
        meter.look(cache, answering=True)
    meter.end(cache)
    return torch.stack(hidden[:-1], 1), cache


@torch.no_grad()
def read_prompts(model: Any, prompts: Sequence[Tensor], look: Callable[[KVCache], object]) -> tuple[Tensor, KVCache]:
    """Read prompts to their end, a row each of a new cache, a stretch at a time.

    Args:
        model: From ``open_model``.
        prompts: Token ids of each, ``(T_b,)``, at least one.
        look: Called with the cache after every stretch, when nothing has been cut yet.

    Returns:
        Last hidden states of their last tokens ``(B, D)``, and the cache, in which prompts have ended.
    """
    ids, mask = pad_rows(prompts, model.device, left=True)
    decoder, cache = model.get_decoder(), model.make_cache()
    for begin in range(0, ids.shape[1], PROMPT_CHUNK):
        part = slice(begin, begin + PROMPT_CHUNK)
        kwargs = {"attention_mask": mask[:, part], "past_key_values": cache, "prefill": True}
        hidden: Tensor = decoder(ids[:, part], **kwargs).last_hidden_state[:, -1]
        look(cache)
    cache.end_prompt()
    return hidden, cache


def pad_rows(rows: Sequence[Tensor], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Ids ``(B, n)`` and the mask of those that are real, which stand at the right end or at the left."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids.to(device), mask.to(device)


def refuse_uncut(model: Any, chunk: int | None) -> None:
    """Refuse to read all of a text as a prompt with a model that keeps prompts whole until they end.

    Args:
        model: From ``open_model``.
        chunk: Tokens that are fed at a time; 1 decodes.

    Raises:
        ValueError: Nothing would ever leave its cache.
    """
    if chunk != 1 and model.make_cache().cuts_prompts:
        raise ValueError(
            'this method cuts a prompt when it ends (prompt="dense"), and all of a text would be one: add --decode, '
            'choose the task continuation, or ask with --ask after, or set prompt="blocks"'
        )
