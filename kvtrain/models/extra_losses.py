"""Losses that a family of hosts has beside that of the tokens, such as how evenly a router uses its experts.

Modules note what such a loss is made of while a forward pass runs. Layers hand them hidden states and nothing else, so
what they note goes to whoever listens: a context variable, one for every thread. Nobody does when activation
checkpointing runs a layer again, and nothing is noted twice.
"""

import contextlib
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor


class LayerNotes(UserDict[int, Any]):
    """What modules noted in one forward pass, by the layer's number; of a layer that runs again, the last time counts.

    Attributes:
        real: ``(B, T)`` tokens that are no padding, in the order in which layers see them; None where all are.
    """

    real: Tensor | None = None


class ExtraLoss(NamedTuple):
    """One loss of a host's family.

    Attributes:
        name: In logs and in ``loss_parts``; ``aux_loss`` for what transformers' hosts return by that name.
        weight: The host's coefficient.
        value: From the notes to the loss, unweighted: a mean over the batch's real tokens, finite where there are none.
            A function of a module, or a partial one of it, since models are pickled with it.
    """

    name: str
    weight: float
    value: Callable[[LayerNotes], Tensor]


_LISTENING: ContextVar[LayerNotes | None] = ContextVar("kvtrain layer notes", default=None)


@contextlib.contextmanager
def collect_notes() -> Iterator[LayerNotes]:
    """Listen to the modules of this forward pass."""
    token = _LISTENING.set(LayerNotes())
    try:
        notes = _LISTENING.get()
        assert notes is not None
        yield notes
    finally:
        _LISTENING.reset(token)


def note(layer_idx: int, value: Any) -> None:
    """Note something for a loss of the family, if anyone listens; modules with frozen weights have nothing to note.

    Args:
        layer_idx: The layer's number.
        value: Such as a router's logits ``(B T, experts)``, with their gradient.
    """
    notes = _LISTENING.get()
    if notes is not None:
        notes[layer_idx] = value


def note_real_tokens(real: Tensor | None) -> None:
    """Note which tokens ``(B, T)`` are no padding, if anyone listens."""
    notes = _LISTENING.get()
    if notes is not None:
        notes.real = real


def add_extra_losses(
    total: Tensor, parts: dict[str, Tensor], losses: Sequence[ExtraLoss], notes: LayerNotes, targets: Tensor
) -> Tensor:
    """A summed loss together with those of the host.

    These are means over a batch, and the other is a sum over targets that is divided by a number of targets in the end,
    maybe that of several batches and ranks. Every target brings its batch's mean along, once: divided by whatever
    number, the weights of all batches add up to the coefficient, and a batch without targets has none.

    Args:
        total: Over the targets.
        parts: Its parts by name; gains those of the host, unweighted, without gradient, as sums like the others.
        losses: The host's.
        notes: Of the forward pass.
        targets: How many there are.
    """
    for loss in losses:
        value = loss.value(notes).to(total.device) * targets
        total = total + loss.weight * value
        parts[loss.name] = value.detach()
    return total
