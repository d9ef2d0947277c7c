"""Feed-forward parts in which a router sends every token to a few of many experts."""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kvtrain.kernels.experts import experts_mlp
from kvtrain.models.extra_losses import note

EXPERTS_NAME = "kvtrain"


def _forward(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What transformers' modules of experts do under the name of ``EXPERTS_NAME``."""
    return experts_mlp(hidden, chosen, weights, module.gate_up_proj, module.down_proj)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _forward)


class ExpertsMLP(nn.Module):
    """Takes the place of ``Qwen3MoeSparseMoeBlock`` and its like; router and experts are the host's own modules.

    Args:
        host: Has a router, ``gate``, that gives logits, weights and numbers of a token's experts, and ``experts`` with
            matrices ``(experts, out, in)``.
        layer_idx: The layer's number.
    """

    gate: Any
    experts: Any

    def __init__(self, host: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        for name, child in host.named_children():
            self.add_module(name, child)

    def weight_flops(self) -> dict[nn.Parameter, int]:
        """See ``HasOtherWeights``: of all experts a token takes ``top_k``."""
        gate, experts = self.gate, self.experts
        width = experts.hidden_dim * experts.intermediate_dim
        return {
            gate.weight: 2 * experts.hidden_dim * experts.num_experts,
            experts.gate_up_proj: 4 * width * gate.top_k,
            experts.down_proj: 2 * width * gate.top_k,
        }

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Feed ``(B, T, D)`` forward."""
        flat = hidden_states.flatten(0, 1)
        logits, weights, chosen = self.gate(flat)
        if self.training and self.gate.weight.requires_grad:
            note(self.layer_idx, logits)
        output: Tensor = self.experts(flat, chosen, weights)
        return output.view_as(hidden_states)
