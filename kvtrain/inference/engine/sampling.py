"""The next token of every row: one argmax for greedy ones, transformers' processors for rows of equal settings."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvtrain.inference.engine.request import Sampling, TokenLogprob


@dataclass(eq=False)
class Sampler:
    """What choosing the next tokens of one sequence needs; a generator of its own makes it independent of others.

    Args:
        settings: Of its request.
        prompt: Token ids.
        output: Token ids of the answer so far; whoever extends the answer extends this list.
        index: Which of several answers to one request.
        logprobs: How many alternatives come with a token, or None.
    """

    settings: Sampling
    prompt: Sequence[int]
    output: list[int]
    index: int = 0
    logprobs: int | None = None
    group: Sampling = field(init=False)
    generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.group = replace(self.settings, seed=None)
        seed = self.settings.seed
        self.generator = random.Random(None if seed is None else f"{seed}/{self.index}")


@torch.no_grad()
def sample(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of every row, and how likely it was where a row wants to know.

    Args:
        logits: ``(B, V)``.
        samplers: One a row.
    """
    logits = logits.float()  # as `generate` does
    tokens = logits.argmax(-1)
    for settings, rows in _groups(samplers).items():
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _sample_group(logits[index], settings, [samplers[row] for row in rows])
    chosen: list[int] = tokens.tolist()
    return chosen, _logprobs(logits, tokens, samplers)


def _groups(samplers: Sequence[Sampler]) -> dict[Sampling, list[int]]:
    """Rows by their settings, seeds apart, without those that take the best token as it is."""
    groups: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        if not sampler.settings.greedy or _changes_scores(sampler.settings):
            groups.setdefault(sampler.group, []).append(row)
    return groups


def _changes_scores(settings: Sampling) -> bool:
    """Whether the best token may become another one."""
    penalties = settings.presence_penalty or settings.frequency_penalty or settings.repetition_penalty != 1
    return bool(penalties or settings.logit_bias)


def _sample_group(scores: Tensor, settings: Sampling, samplers: Sequence[Sampler]) -> Tensor:
    """Tokens ``(B,)`` of rows with equal settings, from ``(B, V)``, in the order of transformers' ``generate``."""
    ids = torch.zeros(len(samplers), 1, dtype=torch.long, device=scores.device)
    if settings.repetition_penalty != 1:
        # Padded with a token of the row's own, which is penalized once however often it stands there.
        ids = _padded([[*s.prompt, *s.output] for s in samplers], [s.prompt[0] for s in samplers], scores.device)
    processors, warpers = _processors(settings)
    scores = processors(ids, scores)
    if settings.presence_penalty or settings.frequency_penalty:
        counts = _counts([s.output for s in samplers], scores)
        scores = scores - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
    if settings.greedy:
        return scores.argmax(-1)
    return _draw(warpers(ids, scores), [s.generator.random() for s in samplers])


@lru_cache(maxsize=128)  # a bias is as wide as the vocabulary and is made once
def _processors(settings: Sampling) -> tuple[Any, Any]:
    """What changes scores, and what cuts their distribution."""
    processors, warpers = LogitsProcessorList(), LogitsProcessorList()
    if settings.logit_bias:
        biases = {(token,): float(bias) for token, bias in settings.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(biases))  # type: ignore[arg-type]
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
    if settings.temperature != 1 and not settings.greedy:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(float(settings.top_p)))
    if settings.min_p:
        warpers.append(MinPLogitsWarper(float(settings.min_p)))
    return processors, warpers


def _padded(ids: Sequence[Sequence[int]], padding: Sequence[int], device: torch.device) -> Tensor:
    """``(B, T)`` of lists of several lengths, each filled up with a number of its own."""
    longest = max(map(len, ids))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row, fill in zip(ids, padding, strict=True)]).to(
        device
    )


def _counts(outputs: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
    """How often each token stands in each output, ``(B, V)``."""
    vocabulary = scores.shape[1]
    ids = pad_sequence([torch.tensor(o, dtype=torch.long) for o in outputs], True, vocabulary).to(scores.device)
    counts = scores.new_zeros(len(outputs), vocabulary + 1)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))[:, :vocabulary]


def _draw(scores: Tensor, uniform: Sequence[float]) -> Tensor:
    """Tokens ``(B,)`` where the running sum of probabilities passes a number from [0, 1).

    One number a row, whatever the vocabulary: rows need no generator on the device.
    """
    sums = scores.double().softmax(-1).cumsum(-1)
    total = sums[:, -1:]
    wanted = total * torch.tensor(uniform, dtype=sums.dtype, device=sums.device)[:, None]
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted, right=True)[:, 0]


def _logprobs(logits: Tensor, tokens: Tensor, samplers: Sequence[Sampler]) -> list[TokenLogprob | None]:
    """Of the rows that ask for it, from logits ``(B, V)`` as the model gave them."""
    answers: list[TokenLogprob | None] = [None] * len(samplers)
    rows = [row for row, sampler in enumerate(samplers) if sampler.logprobs is not None]
    if not rows:
        return answers
    index = torch.tensor(rows, device=logits.device)
    logprobs = logits[index].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[index, None])[:, 0].tolist()
    most = max(samplers[row].logprobs or 0 for row in rows)
    best = logprobs.topk(min(most, logprobs.shape[1]), -1)
    values, ids, picked = best.values.tolist(), best.indices.tolist(), tokens[index].tolist()
    for place, row in enumerate(rows):
        count = samplers[row].logprobs or 0
        alternatives = tuple(zip(ids[place][:count], values[place][:count], strict=True))
        answers[row] = TokenLogprob(picked[place], chosen[place], alternatives)
    return answers
