"""What families with experts have in common; none by itself."""

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.losses.load_balancing import load_balancing
from kvtrain.models.extra_losses import ExtraLoss, LayerNotes
from kvtrain.models.hosts.base import HostAdapter
from kvtrain.models.late_tensor import LateTensor


def balance(notes: LayerNotes, *, chosen: int) -> Tensor:
    """The routers' loss from the logits ``(B T, experts)`` that they noted.

    Args:
        notes: Of a forward pass.
        chosen: Experts of a token.
    """
    return load_balancing(list(notes.values()), chosen, None if notes.real is None else notes.real.flatten())


class ExpertsAdapter(HostAdapter):
    """See ``HostAdapter``; layers whose feed-forward part has no router may stand among the others.

    Attributes:
        router: Of a feed-forward part.
        gives_weights: Whether a feed-forward part gives the weights of a token's experts beside its output.
        stored_mlp: What files call the feed-forward part.
        stored_projections: And of each expert the gate, what is gated, and the way back; None where files hold weights
            as models do.
    """

    router: ClassVar[str] = "gate"
    gives_weights: ClassVar[bool] = False
    stored_mlp: ClassVar[str] = "mlp"
    stored_projections: ClassVar[tuple[str, str, str] | None] = ("gate_proj", "up_proj", "down_proj")

    def feed_forward(self, mlp: nn.Module, layer_idx: int) -> nn.Module:
        """See ``HostAdapter``."""
        from kvtrain.models.experts import ExpertsMLP

        if not hasattr(mlp, "experts"):
            return super().feed_forward(mlp, layer_idx)
        return ExpertsMLP(mlp, layer_idx, self.router, self.gives_weights)

    def stored_weights(self, weights: Mapping[str, Tensor], config: PreTrainedConfig) -> Mapping[str, Tensor]:
        """See ``HostAdapter``: files hold every expert by itself, and models all of a layer in two tensors."""
        if self.stored_projections is None:
            return weights
        named, experts = dict(weights), range(config.num_experts)
        for layer in range(config.num_hidden_layers):
            own, stored = (f"model.layers.{layer}.{mlp}." for mlp in (self.mlp, self.stored_mlp))
            parts = [
                [f"{stored}experts.{expert}.{name}.weight" for expert in experts] for name in self.stored_projections
            ]
            if f"{stored}gate.weight" in named:
                named[f"{own}gate.weight"] = named.pop(f"{stored}gate.weight")
            if all(name in named for part in parts for name in part):
                gates, ups, downs = ([named.pop(name) for name in part] for part in parts)
                named[f"{own}experts.gate_up_proj"] = LateTensor.stack(gates, ups)
                named[f"{own}experts.down_proj"] = LateTensor.stack(downs)
        return named

    def file_weights(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """See ``HostAdapter``: every expert by itself."""
        if self.stored_projections is None:
            return {name: weight}
        stored, (gate, up, down) = name.replace(f".{self.mlp}.", f".{self.stored_mlp}."), self.stored_projections
        place, _, last = stored.rpartition(".")
        if last == "gate_up_proj":
            parts = dict(zip((gate, up), weight.chunk(2, 1), strict=True))
        elif place.endswith(".experts"):
            parts = {down: weight}
        else:
            return {stored if ".gate." in stored else name: weight}
        return {
            f"{place}.{expert}.{part}.weight": matrix.clone()  # safetensors wants memory of its own for each
            for part, matrices in parts.items()
            for expert, matrix in enumerate(matrices)
        }

    def extra_losses(self, config: PreTrainedConfig) -> Sequence[ExtraLoss]:
        """See ``HostAdapter``: how unevenly experts are used."""
        value = functools.partial(balance, chosen=config.num_experts_per_tok)
        return [ExtraLoss("aux_loss", config.router_aux_loss_coef, value)]
