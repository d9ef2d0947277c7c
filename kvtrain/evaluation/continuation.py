"""What the end of a text costs a model that has read its beginning as a prompt, and what its cache takes meanwhile."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.evaluation.answering import AnsweringBytes, AnsweringMeter, decode_answers
from kvtrain.evaluation.perplexity import perplexity_of
from kvtrain.kernels.cross_entropy import linear_token_losses

_BATCH = 8


@dataclass(frozen=True)
class ContinuationResult:
    """What continuations cost a model.

    Attributes:
        perplexity: ``exp`` of the mean loss of a token behind the prompts.
        tokens: Those.
        windows: How many there are.
        answering: Bytes of the cache while they are decoded.
    """

    perplexity: float
    tokens: int
    windows: int
    answering: AnsweringBytes


@torch.no_grad()
def continuation(model: Any, windows: Tensor, prompt: int, batch: int = _BATCH) -> ContinuationResult:
    """Read the beginning of every window as a prompt, then decode and score the rest, token by token.

    Args:
        model: From ``open_model``.
        windows: Token ids ``(N, T)``, such as ``full_windows`` reads.
        prompt: Tokens of a prompt.
        batch: Windows that are read at a time; the figures do not depend on it.

    Raises:
        ValueError: The prompt is empty, or leaves nothing to score.
    """
    length = windows.shape[1]
    check_prompt(prompt, length)
    head, meter, loss = model.get_output_embeddings(), AnsweringMeter(model), 0.0
    for rows in windows.split(batch):
        hidden, _ = decode_answers(model, list(rows), [prompt] * len(rows), meter)
        targets = rows[:, prompt:].flatten().to(hidden.device)
        loss += linear_token_losses(hidden.flatten(0, 1), head, targets).double().sum().item()
    tokens = len(windows) * (length - prompt)
    return ContinuationResult(perplexity_of(loss / tokens), tokens, len(windows), meter.result())


def check_prompt(prompt: int, length: int) -> None:
    """Make sure that a prompt is there and ends before its window does.

    Raises:
        ValueError: It is not.
    """
    if not 1 <= prompt < length:
        raise ValueError(f"a prompt of {prompt} tokens leaves nothing to score or to go on from; use 1 to {length - 1}")
