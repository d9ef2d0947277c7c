"""Whether a model finds what is hidden in a text, passkeys or what names mean, read through the cache that serves."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kvtrain.data.haystack import HaystackTask, Sample
from kvtrain.evaluation.answering import AnsweringBytes, AnsweringMeter, decode_answers, refuse_uncut
from kvtrain.evaluation.samples import SAMPLES, corpus_tokens, draw_samples

Ask = Literal["after", "within"]

_BATCH = 8
_CHUNK = 256


@dataclass(frozen=True)
class RecallResult:
    """How much a model finds of what it is asked for.

    Attributes:
        accuracy: Share of answers that greedy decoding gives whole: every token is the most likely one after the
            right ones before it.
        token_accuracy: Share of their tokens.
        answers: Asked for.
        hidden: Needles in a sample, mean; fewer than the task's where samples are too short for all.
        compression: Tokens per kept slot, as total tokens over mean slots.
        kv_bytes_per_1024: Bytes allocated for 1,024 tokens of a sample, spare pages aside.
        answering: Bytes of the cache while answers are decoded; None where a sample is read as a whole.
    """

    accuracy: float
    token_accuracy: float
    answers: int
    hidden: float
    compression: float
    kv_bytes_per_1024: float
    answering: AnsweringBytes | None = None


@torch.no_grad()
def recall(
    model: Any,
    tokenizer: Any,
    corpus: str,
    task: HaystackTask,
    *,
    sequence_length: int = 1024,
    limit: int | None = None,
    chunk: int | None = None,
    ask: Ask | None = None,
) -> RecallResult:
    """Ask a model for what is hidden, the same every time, each sample in a cache of its own.

    Args:
        model: From ``open_model``.
        tokenizer: Its tokenizer.
        corpus: Text to hide it in; see ``kvtrain.data.corpus.read_corpus``.
        task: What is hidden and asked for.
        sequence_length: Tokens of a sample.
        limit: Samples; 50 where absent.
        chunk: Tokens of a whole sample fed at a time; 1 decodes. 256 where absent.
        ask: ``"after"``: the book is a prompt, which a cache may cut before anything is known of the questions, and
            these are decoded with their answers; ``"within"``: the first question belongs to the prompt. None: a sample
            is read as a whole.

    Raises:
        ValueError: The corpus cannot be read or holds no text, nothing fits into a sample, or a sample is to be read
            as a whole and not decoded with a model that cuts prompts when they end.
    """
    check_ask(ask)
    if ask is None:
        refuse_uncut(model, chunk)
    samples = _samples(tokenizer, corpus, task, sequence_length, SAMPLES if limit is None else limit)
    meter = AnsweringMeter(model) if ask else None
    found: list[Tensor] = []  # (tokens,) of each answer, right or wrong
    slots = num_bytes = 0.0
    for begin in range(0, len(samples), _BATCH):
        batch = samples[begin : begin + _BATCH]
        predicted, cache = _answer(model, batch, ask, meter) if ask and meter else _read(model, batch, chunk or _CHUNK)
        found += [
            row[answer.start - 1 : answer.stop - 1] == torch.from_numpy(sample.input_ids[answer]).to(row.device)
            for row, sample in zip(predicted, batch, strict=True)
            for answer in sample.answers
        ]
        slots += cache.mean_kv_tokens().sum().item()
        num_bytes += cache.kv_bytes() - cache.free_bytes()
    return RecallResult(
        accuracy=sum(bool(right.all()) for right in found) / len(found),
        token_accuracy=torch.cat(found).double().mean().item(),
        answers=len(found),
        hidden=sum(sample.needles for sample in samples) / len(samples),
        compression=len(samples) * sequence_length / slots,
        kv_bytes_per_1024=num_bytes / (len(samples) * sequence_length) * 1024,
        answering=None if meter is None else meter.result(),
    )


def check_ask(ask: str | None) -> None:
    """Refuse what is no time to ask.

    Raises:
        ValueError: It is none.
    """
    if ask is not None and ask not in get_args(Ask):
        raise ValueError(f"ask must be {' or '.join(get_args(Ask))}, not {ask!r}")


def _samples(tokenizer: Any, corpus: str, task: HaystackTask, length: int, count: int) -> list[Sample]:
    """The first samples, always the same."""
    return draw_samples(task.writer(tokenizer), corpus_tokens(tokenizer, corpus), length, count)


def _read(model: Any, samples: list[Sample], chunk: int) -> tuple[Tensor, Any]:
    """The token that each prefix makes most likely, ``(B, T)``, from the first question on; and the full cache."""
    ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples])).to(model.device)
    first = min(sample.answers[0].start for sample in samples) - 1
    cache, head = model.make_cache(), model.get_output_embeddings()
    predicted = torch.full_like(ids, -1)
    for begin in range(0, ids.shape[1], chunk):
        kwargs = {"past_key_values": cache, "prefill": chunk > 1}
        hidden = model.get_decoder()(ids[:, begin : begin + chunk], **kwargs).last_hidden_state
        columns = slice(max(first, begin), begin + hidden.shape[1])
        if columns.start < columns.stop:
            predicted[:, columns] = head(hidden[:, columns.start - begin :]).argmax(-1)
    return predicted, cache


def _answer(model: Any, samples: list[Sample], ask: Ask, meter: AnsweringMeter) -> tuple[Tensor, Any]:
    """As ``_read``, of samples that are a prompt up to some place, and are decoded from there on."""
    prompts = [sample.book if ask == "after" else sample.answers[0].start for sample in samples]
    rows = [torch.from_numpy(sample.input_ids) for sample in samples]
    hidden, cache = decode_answers(model, rows, prompts, meter)
    tokens = model.get_output_embeddings()(hidden).argmax(-1)
    predicted = torch.full((len(samples), samples[0].input_ids.size), -1, device=tokens.device)
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        count = sample.input_ids.size - prompt
        predicted[row, prompt - 1 : prompt - 1 + count] = tokens[row, :count]
    return predicted, cache
