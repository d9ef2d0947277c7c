"""Binary decisions of heads about tokens that can be trained: relaxed while training, hard when serving."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kvtrain.metrics import Table

# A logit that makes the sigmoid 0 in every dtype, without the NaN gradients of infinity.
NEVER = -1e4

# At every validation, the share of tokens that a head compressed, of those that had a choice.
HEAD_COMPRESSION = Table("head_compression.csv", ("step", "layer", "head", "merged_fraction"))


@runtime_checkable
class BorrowsChannel(Protocol):
    """Attention that may read its decisions from a channel."""

    def borrowed_rows(self) -> dict[str, slice]:
        """Projections by name, and rows of their weights and biases that make it; none where nothing is borrowed."""


def borrowed_rows(model: nn.Module) -> dict[str, slice]:
    """Modules of a model by name, and which rows of their weights and biases make borrowed channels."""
    return {
        f"{name}.{projection}": rows
        for name, module in model.named_modules()
        if isinstance(module, BorrowsChannel)
        for projection, rows in module.borrowed_rows().items()
    }


def borrowed_parameters(model: nn.Module) -> list[tuple[nn.Parameter, slice]]:
    """Weights and biases of ``borrowed_rows``, and the rows."""
    found = borrowed_rows(model).items()
    return [(parameter, rows) for name, rows in found for parameter in model.get_submodule(name).parameters()]


@dataclass(frozen=True, kw_only=True)
class DecisionStep:
    """What a training step says to attention that decides; methods add to it.

    Args:
        seed: Of the noise.
        step: Optimizer step.
        row_ids: ``(B,)`` rows, so that noise belongs to the row; None trains without noise.
        compression: Tokens a slot aimed at in this step.
    """

    seed: int = 0
    step: int = 0
    row_ids: Tensor | None = None
    compression: float | None = None


class Decisions(NamedTuple):
    """Decisions of one layer.

    Attributes:
        logits: ``(B, H_kv, T)`` after noise and temperature.
        values: Probabilities of deciding while training, 0 or 1 when hard.
    """

    logits: Tensor
    values: Tensor

    def keep_bias(self) -> Tensor:
        """Attention bias ``log(1 - decision)`` of each token, soft or hard, ``(B, H_kv, T)``."""
        return torch.nn.functional.logsigmoid(-self.logits)

    def straight_through(self) -> Tensor:
        """Hard decisions forward, gradient of the soft ones."""
        hard = (self.values > 0.5).to(self.values.dtype)
        return hard + (self.values - self.values.detach())


def decide(logits: Tensor, *, never: Tensor, temperature: float | None = None) -> Decisions:
    """Turn logits into decisions, in at least float32.

    Args:
        logits: ``(B, H_kv, T)``, noise included; positive decides.
        never: ``(B, 1 or H_kv, T)`` tokens that must not decide (document starts, padding).
        temperature: Of the relaxation; None decides hard.
    """
    if temperature is None:
        hard = decide_hard(logits, never)
        return Decisions(torch.where(hard > 0, float("inf"), NEVER).to(logits.dtype), hard)
    relaxed = (logits / temperature).masked_fill(never, NEVER)
    return Decisions(relaxed, torch.sigmoid(relaxed))


def decide_hard(logits: Tensor, never: Tensor) -> Tensor:
    """Hard decisions alone, 0 or 1 in the dtype of the logits; arguments as in ``decide``."""
    return ((logits > 0) & ~never).to(logits.dtype)


def has_choice(document_ids: Tensor) -> Tensor:
    """Tokens ``(B, T)`` that may decide: neither padding, which is document 0, nor a document's first."""
    free = document_ids > 0
    free[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    free[:, 0] = False
    return free


def next_token(values: Tensor) -> Tensor:
    """What the following token says of each token ``(B, H, T)``; the last hears nothing."""
    return torch.nn.functional.pad(values[..., 1:], (0, 1))
