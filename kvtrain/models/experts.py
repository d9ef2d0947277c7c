"""Feed-forward parts in which a router sends every token to a few of many experts."""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kvtrain.kernels.experts import experts_mlp
from kvtrain.models.extra_losses import note

EXPERTS_NAME = "kvtrain"


def _forward(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What transformers' modules of experts do under the name of ``EXPERTS_NAME``."""
    gate_up, down = module.gate_up_proj, module.down_proj
    if module.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else None
    gate = None if module.is_concatenated else module._apply_gate  # who interleaves has a gate of its own
    return experts_mlp(hidden, chosen, weights, gate_up, down, biases=biases, gate=gate)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _forward)


class ExpertsMLP(nn.Module):
    """Takes the place of ``Qwen3MoeSparseMoeBlock`` and its like; router and experts are the host's own modules.

    Args:
        host: Has a router that gives logits, weights and numbers of a token's experts, and ``experts`` with matrices of
            all of them.
        layer_idx: The layer's number.
        router: What the host calls its router.
        gives_weights: Whether the host's layers want the weights ``(B T, k)`` beside the output.
    """

    experts: Any

    def __init__(self, host: nn.Module, layer_idx: int, router: str = "gate", gives_weights: bool = False) -> None:
        super().__init__()
        self.layer_idx, self.router_name, self.gives_weights = layer_idx, router, gives_weights
        for name, child in host.named_children():
            self.add_module(name, child)

    def weight_flops(self) -> dict[nn.Parameter, int]:
        """See ``HasOtherWeights``: of all experts a token takes ``top_k``."""
        router, experts = getattr(self, self.router_name), self.experts
        hidden = router.hidden_dim
        # Families have two names for one size; a weight's own shape is no guide under ZeRO-3.
        width = hidden * getattr(experts, "intermediate_dim", getattr(experts, "intermediate_size", 0))
        return {
            router.weight: 2 * hidden * experts.num_experts,
            experts.gate_up_proj: 4 * width * router.top_k,
            experts.down_proj: 2 * width * router.top_k,
        }

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Feed ``(B, T, D)`` forward."""
        flat, router = hidden_states.flatten(0, 1), getattr(self, self.router_name)
        logits, weights, chosen = router(flat)
        if self.training and router.weight.requires_grad:
            note(self.layer_idx, logits)
        output: Tensor = self.experts(flat, chosen, weights).view_as(hidden_states)
        return (output, weights) if self.gives_weights else output
