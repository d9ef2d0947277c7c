"""A family with experts and a router, in one file, for the test that plants it: Qwen3-MoE as transformers has it."""

import functools

import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from kvtrain.models.extra_losses import ExtraLoss, note
from kvtrain.models.hosts.base import HostAdapter


class ExpertsConfig(Qwen3MoeConfig):
    model_type = "experts"


class ExpertsForCausalLM(Qwen3MoeForCausalLM):
    config_class = ExpertsConfig


def note_logits(layer_idx, router, inputs, output):
    """A forward hook: a router gives its logits first."""
    if router.weight.requires_grad:
        note(layer_idx, output[0])


def balance(notes, *, experts, chosen):
    """Equations (4) to (6) of Switch Transformer, over the real tokens of all layers together."""
    logits = torch.cat(list(notes.values()))
    probabilities = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32))
    real = torch.ones(len(logits), device=logits.device) if notes.real is None else notes.real.flatten().float()
    real = real.repeat(len(logits) // len(real))[:, None]
    load = torch.zeros_like(probabilities).scatter(1, logits.topk(chosen).indices, 1.0)
    count = real.sum().clamp(min=1)
    return experts * ((load * real).sum(0) / count * (probabilities * real).sum(0) / count).sum()


class ExpertsAdapter(HostAdapter):
    model_type = "experts"
    query_key_norm = "head"

    def feed_forward(self, mlp, layer_idx):
        mlp.gate.register_forward_hook(functools.partial(note_logits, layer_idx))
        return mlp

    def extra_losses(self, config):
        value = functools.partial(balance, experts=config.num_experts, chosen=config.num_experts_per_tok)
        return [ExtraLoss("aux_loss", config.router_aux_loss_coef, value)]


ADAPTER, FAMILY = ExpertsAdapter(), (ExpertsConfig, ExpertsForCausalLM)
