"""RULER's kinds of tasks through the cache that serves: greedy answers, and how much of what was asked is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.data.haystack import Ids
from kvtrain.data.ruler import RulerTask
from kvtrain.evaluation.answering import read_prompts
from kvtrain.evaluation.recall import Ask, check_ask
from kvtrain.evaluation.row_meter import RowFigures, RowMeter, RowWatch
from kvtrain.evaluation.samples import SAMPLES, draw_samples
from kvtrain.models.end_tokens import end_token_ids

_BATCH = 8


@dataclass(frozen=True)
class RulerResult:
    """How much a model says of what it is asked for.

    Attributes:
        recall: Share of what an answer must name that it names, capitals aside, in the mean over samples; RULER's
            score.
        samples: How many there are.
        needles: Hidden in a sample, in the mean.
        answering: What the cache holds while answers are decoded.
    """

    recall: float
    samples: int
    needles: float
    answering: RowFigures


@torch.no_grad()
def ruler(
    model: Any,
    tokenizer: Any,
    haystack: Ids,
    task: RulerTask,
    *,
    limit: int | None = None,
    seed: int = 0,
    ask: Ask | None = None,
    batch: int = _BATCH,
) -> RulerResult:
    """Let a model answer in its own words, greedily, up to its end token or the length that RULER allows.

    An answer may always be twice as long as the expected one, as tokenizers differ. A sample's tokens are those of its
    prompt and of the expected answer.

    Args:
        model: From ``open_model``.
        tokenizer: Its tokenizer.
        haystack: Tokens to hide needles in, where the kind hides them in text; see ``corpus_tokens``.
        task: Kind and length.
        limit: Samples; 50 where absent.
        seed: Of the samples.
        ask: ``"after"``: what comes before the question is the prompt, which a cache may cut before anything is known
            of the question; ``"within"``, as where absent: the question belongs to the prompt.
        batch: Samples that are read at a time; no figure depends on it.

    Raises:
        ValueError: The kind does not fit into the length.
    """
    check_ask(ask)
    writer = task.writer(tokenizer)
    count = SAMPLES if limit is None else limit
    samples = draw_samples(writer, haystack, task.length, count, seed)
    ends = _end_tokens(model, tokenizer)
    meter, found = RowMeter(model), 0.0
    for begin in range(0, count, batch):
        part = samples[begin : begin + batch]
        whole = [torch.from_numpy(sample.input_ids[: sample.answers[0].start]) for sample in part]
        cuts = [sample.book if ask == "after" else sample.answers[0].start for sample in part]
        most = [max(writer.kind.tokens, 2 * (one.stop - one.start)) for sample in part for one in sample.answers]
        for sample, answer in zip(part, decode_greedily(model, whole, cuts, most, ends, meter), strict=True):
            found += string_recall(tokenizer.decode(answer, skip_special_tokens=True), writer.references(sample))
    answering = meter.result()
    assert answering is not None
    return RulerResult(found / count, count, sum(sample.needles for sample in samples) / count, answering)


def string_recall(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in an answer, capitals aside."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    found = {*end_token_ids(model.generation_config), tokenizer.eos_token_id}
    return {token for token in found if token is not None}


def decode_greedily(
    model: Any, rows: Sequence[Tensor], prompts: Sequence[int], most: Sequence[int], ends: set[int], meter: RowMeter
) -> list[list[int]]:
    """Read the beginning of every row as its prompt, decode the rest of it, and go on with the likeliest tokens.

    Args:
        model: From ``open_model``.
        rows: Token ids of each row, ``(T_b,)``.
        prompts: How many of them are its prompt, at least 1.
        most: New tokens of each row, at least 1.
        ends: Tokens that end an answer.
        meter: Sees the cache that each new token is predicted from.

    Returns:
        New tokens of each row, without what ended them.
    """
    watch = meter.watch()
    hidden, cache = read_prompts(model, [row[:end] for row, end in zip(rows, prompts, strict=True)], watch.look)
    answers = _Answers([row[end:].tolist() for row, end in zip(rows, prompts, strict=True)], most, ends)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    while not answers.over:
        ids, real = answers.step(head(hidden).argmax(-1).tolist(), cache, watch)
        kwargs = {"attention_mask": real[:, None].long().to(model.device), "past_key_values": cache}
        if not answers.over:
            hidden = decoder(ids[:, None].to(model.device), **kwargs).last_hidden_state[:, -1]
    watch.close()
    return answers.tokens


class _Answers:
    """What rows are fed, token by token: first what is left of their questions, then their own answers.

    Args:
        questions: What is left of each.
        most: New tokens of each.
        ends: Tokens that end an answer.
    """

    def __init__(self, questions: list[list[int]], most: Sequence[int], ends: set[int]) -> None:
        self._questions, self._most, self._ends = questions, most, ends
        self._step, self._open = 0, torch.ones(len(questions), dtype=torch.bool)
        self.tokens: list[list[int]] = [[] for _ in questions]

    @property
    def over(self) -> bool:
        """Whether all answers have ended."""
        return not bool(self._open.any())

    def step(self, likeliest: list[int], cache: KVCache, watch: RowWatch) -> tuple[Tensor, Tensor]:
        """Take in the likeliest token of every row; the tokens ``(B,)`` that come next, and which rows go on."""
        asking = torch.tensor([self._step < len(question) for question in self._questions])
        watch.look(cache, self._open & ~asking)
        fed = torch.zeros(len(likeliest), dtype=torch.long)
        for row, token in enumerate(likeliest):
            if asking[row]:
                fed[row] = self._questions[row][self._step]
            elif self._open[row]:
                fed[row] = token
                self._take(row, token)
        self._step += 1
        return fed, self._open

    def _take(self, row: int, token: int) -> None:
        if token not in self._ends:
            self.tokens[row].append(token)
        self._open[row] = token not in self._ends and len(self.tokens[row]) < self._most[row]
