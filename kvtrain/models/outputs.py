"""What a forward pass gives beyond what the host's does."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class LanguageModelOutput(CausalLMOutputWithPast):
    """A host's output, with what a loss of several parts consists of.

    Attributes:
        loss_parts: Parts by name, divided as ``loss`` is, without gradient and before they are weighed; None where it
            has one alone. What a host's family adds is among them by its ``ExtraLoss.name``.
        last_hidden_state: ``(B, T, hidden)`` after the final norm, where nothing was made of it: no loss, no logits.
    """

    loss_parts: dict[str, Tensor] | None = None
    last_hidden_state: Tensor | None = None
