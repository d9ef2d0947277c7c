"""Perplexity through the cache that serves: every window is prefilled into a cache of its own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.data.corpus import read_corpus

_BATCH = 8


@dataclass(frozen=True)
class PerplexityResult:
    """What a corpus costs a model.

    Attributes:
        perplexity: ``exp`` of the mean loss of a target.
        bits_per_byte: Of the corpus' text.
        tokens: Targets.
        compression: Tokens per kept slot, as total tokens over mean slots.
        kv_bytes_per_1024: Bytes allocated for 1,024 tokens of one row, measured on full windows;
            None where no window is full.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    compression: float
    kv_bytes_per_1024: float | None


@torch.no_grad()
def perplexity(
    model: Any, tokenizer: Any, corpus: str, *, sequence_length: int = 1024, limit: int | None = None
) -> PerplexityResult:
    """Measure a model on a corpus, document by document, in windows without overlap.

    Args:
        model: From ``open_model``.
        tokenizer: Its tokenizer.
        corpus: See ``kvtrain.data.corpus.read_corpus``.
        sequence_length: Tokens in a window, its start token included.
        limit: Windows to read; None reads all.

    Raises:
        ValueError: The corpus cannot be read or holds no text.
    """
    loss = torch.zeros((), dtype=torch.float64)
    targets = num_bytes = seen = full_rows = full_bytes = 0
    kept = 0.0
    windows = list(_windows(tokenizer, corpus, sequence_length))[:limit]
    if not windows:
        raise ValueError(f"{corpus}: the corpus is empty: no document holds any text")
    for batch in _batches(windows):
        ids, mask, labels = _pad([window for window, _ in batch], tokenizer)
        cache = model.make_cache()
        output = model(ids, attention_mask=mask, past_key_values=cache, labels=labels, num_items=1, skip_logits=True)
        loss += output.loss.double()
        targets += int((labels[:, 1:] >= 0).sum())
        num_bytes += sum(size for _, size in batch)
        seen += int(mask.sum())
        kept += cache.kv_tokens().double().mean((0, 2)).sum().item()
        if all(len(window) == sequence_length for window, _ in batch):
            full_rows += len(batch)
            full_bytes += cache.kv_bytes()
    mean = loss.item() / targets
    per_1024 = full_bytes / full_rows * 1024 / sequence_length if full_rows else None
    bits = loss.item() / torch.log(torch.tensor(2.0)).item() / num_bytes
    return PerplexityResult(float(torch.tensor(mean).exp()), bits, targets, seen / kept, per_1024)


def _windows(tokenizer: Any, corpus: str, length: int) -> Iterator[tuple[list[int], int]]:
    """Token windows and the bytes of text that their targets stand for."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for document in read_corpus(corpus):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        step = length - len(start)
        for begin in range(0, len(ids), step):
            piece = ids[begin : begin + step]
            if len(start) + len(piece) > 1:
                yield start + piece, len(tokenizer.decode(piece).encode())


def _batches(windows: list[tuple[list[int], int]]) -> Iterable[list[tuple[list[int], int]]]:
    """Groups of windows of similar length, the longest first."""
    ordered = sorted(windows, key=lambda item: -len(item[0]))
    full = [item for item in ordered if len(item[0]) == len(ordered[0][0])]
    rest = ordered[len(full) :]
    for group in (full, rest):
        for begin in range(0, len(group), _BATCH):
            yield group[begin : begin + _BATCH]


def _pad(windows: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded ids, mask and labels; a window's first token is no target."""
    length = max(map(len, windows))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(windows), length), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, window in enumerate(windows):
        tokens = torch.tensor(window)
        ids[row, -len(window) :], mask[row, -len(window) :] = tokens, 1
        labels[row, length - len(window) + 1 :] = tokens[1:]
    return ids, mask, labels
