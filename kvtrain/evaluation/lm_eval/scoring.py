"""Log-likelihoods through the cache that serves: contexts are read once, and continuations decoded from there."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvtrain.cache.rows import CacheSnapshot
from kvtrain.evaluation.answering import PROMPT_CHUNK, pad_rows, read_prompts
from kvtrain.evaluation.row_meter import RowMeter
from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_token_losses

Item = TypeVar("Item")


class Continuation(NamedTuple):
    """Tokens to be scored, and those that come before them; neither is empty."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


class Score(NamedTuple):
    """Log-likelihood of a continuation, in nats, and whether greedy decoding gives it."""

    log_likelihood: float
    greedy: bool


class _ReadContexts(NamedTuple):
    """Contexts that have been read: last hidden states ``(C, D)``, bytes ``(C,)`` at their peak, and the rows."""

    hidden: Tensor
    peak: Tensor
    rows: list[CacheSnapshot]


@torch.no_grad()
def score_continuations(
    model: Any, asked: Sequence[Continuation], batch: int, meter: RowMeter
) -> Iterator[tuple[int, Score]]:
    """Score continuations as the model would serve them, whose contexts are prompts.

    A context that several continuations share is read once. Its prompt ends, which is where some methods cut it, and
    every continuation goes on from a snapshot of its row, token by token.

    Args:
        model: From ``open_model``.
        asked: What to score.
        batch: Rows of a pass; the figures do not depend on it.
        meter: Sees the cache that each token is predicted from.

    Returns:
        The number of each in ``asked`` with its score, as they come.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(asked):
        sharing.setdefault(context, []).append(number)
    for contexts in batched(sorted(sharing, key=len, reverse=True), batch):
        read = _read(model, contexts, meter)
        pairs = [(row, number) for row, context in enumerate(contexts) for number in sharing[context]]
        for part in batched(sorted(pairs, key=lambda pair: -len(asked[pair[1]].tokens)), batch):
            numbers = [number for _, number in part]
            scores = _continue(
                model, read, [row for row, _ in part], [asked[number].tokens for number in numbers], meter
            )
            yield from zip(numbers, scores, strict=True)


def _read(model: Any, contexts: list[tuple[int, ...]], meter: RowMeter) -> _ReadContexts:
    watch = meter.watch()
    hidden, cache = read_prompts(model, [torch.tensor(context) for context in contexts], watch.look)
    assert watch.peak is not None
    return _ReadContexts(hidden, watch.peak, [cache.snapshot_row(row) for row in range(len(contexts))])


def _continue(
    model: Any, read: _ReadContexts, rows: list[int], continuations: list[tuple[int, ...]], meter: RowMeter
) -> list[Score]:
    """Decode each continuation behind the context in ``rows``, in a row of its own."""
    cache, decoder, head = model.make_cache(), model.get_decoder(), model.get_output_embeddings()
    for place in cache.admit(len(rows)):
        cache.restore_row(place, read.rows[rows[place]])
    ids, mask = pad_rows([torch.tensor(tokens) for tokens in continuations], model.device, left=False)
    hidden, watch = read.hidden[rows], meter.watch(read.peak[rows])
    totals, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
    for step in range(ids.shape[1]):
        if step:
            kwargs = {"attention_mask": mask[:, step : step + 1], "past_key_values": cache}
            hidden = decoder(ids[:, step - 1 : step], **kwargs).last_hidden_state[:, -1]
        scored = mask[:, step].bool()
        watch.look(cache, scored)
        targets = torch.where(scored, ids[:, step], IGNORE_INDEX).to(hidden.device)
        totals -= linear_token_losses(hidden, head, targets).double().cpu()
        greedy &= (head(hidden).argmax(-1) == targets).cpu() | ~scored.cpu()
    watch.close()
    return [Score(total, right) for total, right in zip(totals.tolist(), greedy.tolist(), strict=True)]


@torch.no_grad()
def score_windows(
    model: Any, windows: Sequence[Continuation], batch: int, meter: RowMeter, *, decode: bool = False
) -> Iterator[tuple[int, float]]:
    """Score the ends of windows that are read as a whole, each in a row of its own, in stretches.

    Args:
        model: From ``open_model``.
        windows: Tokens that are read, and behind them those that are scored, the last of which is not read.
        batch: Rows of a pass; the figures do not depend on it.
        meter: Sees the cache at the end of every stretch.
        decode: Read token by token, as answers are.

    Returns:
        The number of each window with its log-likelihood, as they come.
    """
    order = sorted(range(len(windows)), key=lambda number: -sum(map(len, windows[number])))
    for numbers in batched(order, batch):
        yield from zip(numbers, _feed(model, [windows[number] for number in numbers], meter, decode), strict=True)


def _feed(model: Any, windows: list[Continuation], meter: RowMeter, decode: bool) -> list[float]:
    whole = [torch.tensor(context + tokens) for context, tokens in windows]
    ids, mask = pad_rows([row[:-1] for row in whole], model.device, left=False)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for number, (context, tokens) in enumerate(windows):
        begin = len(context) - 1
        targets[number, begin : begin + len(tokens)] = torch.tensor(tokens)
    cache, head, watch, chunk = (
        model.make_cache(),
        model.get_output_embeddings(),
        meter.watch(),
        1 if decode else PROMPT_CHUNK,
    )
    totals = torch.zeros(len(windows), dtype=torch.float64)
    for begin in range(0, ids.shape[1], chunk):
        part = slice(begin, begin + chunk)
        kwargs = {"attention_mask": mask[:, part], "past_key_values": cache, "prefill": not decode}
        hidden = model.get_decoder()(ids[:, part], **kwargs).last_hidden_state
        watch.look(cache, mask[:, part].any(1))
        losses = linear_token_losses(hidden.flatten(0, 1), head, targets[:, part].flatten().to(hidden.device))
        totals -= losses.double().view(hidden.shape[:2]).sum(1).cpu()
    watch.close()
    return totals.tolist()


def batched(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items, the last of which may be shorter."""
    for begin in range(0, len(items), size):
        yield list(items[begin : begin + size])
