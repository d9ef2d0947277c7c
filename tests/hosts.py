"""Tiny hosts of every supported family, and DMC and DMS models that decide at a chosen rate."""

import copy
import functools
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import kvtrain

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "gpt_oss": GptOssConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "olmo2": Olmo2Config,
    "olmoe": OlmoeConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
VOCAB = 61
# Families with experts: five of them, of which a token has two.
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    "gpt_oss": EXPERTS,
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16},
}


# Families whose attention has learned sinks, which not every method knows.
SINKS = ("gpt_oss",)
WITHOUT_SINKS = tuple(family for family in FAMILIES if family not in SINKS)


def make_host(
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    layers: int = 2,
    **settings: object,
) -> PreTrainedModel:
    """A host with random weights, in evaluation mode; biases, norms and sinks are random too."""
    if family == "gpt_oss":
        plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        settings = {**plain, "layer_types": ["full_attention"] * layers, **settings}
    config = FAMILIES[family](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        sliding_window=128 if family == "gpt_oss" else None,  # which makes a mask of it for no layer, too
        **{"head_dim": 8, "vocab_size": VOCAB, **FAMILY_SETTINGS.get(family, {}), **settings},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "k_proj" in name or "q_proj" in name:
                parameter.mul_(10)  # decisions that differ from token to token, attention that is not flat
            elif name.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter))
            elif ".experts." in name or name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                parameter.mul_(10)  # routers that tell tokens apart, experts that can be told apart
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without special ones, ``(B, T)``."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def merge_rate(model: PreTrainedModel, ids: Tensor) -> float:
    """Share of decisions that merge, over layers, heads and tokens but the first."""
    outputs: dict[int, Tensor] = {}
    with torch.no_grad():
        model(ids, use_cache=False, outputs=outputs)
    return torch.stack(list(outputs.values()))[..., 1:].mean().item()


def set_bias(model: PreTrainedModel, bias: float) -> None:
    """Move the threshold of every decision."""
    for layer in model.model.layers:
        layer.self_attn.settings = replace(layer.self_attn.settings, init_bias=bias)


def dmc_at_rate(host: PreTrainedModel, rate: float, ids: Tensor, **settings: object) -> PreTrainedModel:
    """Retrofit DMC and move the decision threshold until about ``rate`` of the tokens merge."""
    model = kvtrain.retrofit(host, kvtrain.DMC(**settings))
    low, high = -50.0, 50.0  # a lower threshold merges more
    if rate in (0.0, 1.0):
        set_bias(model, high if rate == 0.0 else low)
        return model
    for _ in range(12):
        middle = (low + high) / 2
        set_bias(model, middle)
        low, high = (middle, high) if merge_rate(model, ids) > rate else (low, middle)
    return model


def dms_at_rate(host: PreTrainedModel, rate: float, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Retrofit DMS with random adapters, about ``rate`` of whose decisions mark the token before them."""
    threshold = NormalDist().inv_cdf(1 - rate) if 0 < rate < 1 else 100.0 - 200.0 * rate
    return random_adapters(kvtrain.retrofit(host, kvtrain.DMS(**{"init_bias": threshold, **settings})), seed)


@torch.no_grad()
def random_adapters(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Let adapters decide by what is about normal with deviation 1."""
    scale = model.method.decision_scale * model.config.host_config.hidden_size**0.5
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        weight = layer.self_attn.dms_proj_alpha.weight
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / scale)
    return model


def exact(host: PreTrainedModel) -> PreTrainedModel:
    """The same host in float64 throughout: transformers computes norms and angles in float32."""
    host = copy.deepcopy(host)
    host.set_experts_implementation("eager")  # the only one that has float64
    for name, module in host.named_modules():
        if name.endswith("norm"):
            module.forward = functools.partial(_exact_norm, module.weight, module.variance_epsilon)
    host.model.rotary_emb.forward = functools.partial(_exact_angles, host.model.rotary_emb)
    return host


def _exact_norm(weight: Tensor, epsilon: float, states: Tensor) -> Tensor:
    return weight * states * (states.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _exact_angles(rotary: nn.Module, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    config, frequencies = rotary.config, rotary.inv_freq.double()
    if rotary.rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        frequencies = config.rope_parameters["rope_theta"] ** -exponents
    angles = position_ids.unsqueeze(-1) * frequencies
    if config.model_type != "gpt_oss":  # which turns halves by the same angles, and has them once
        angles = torch.cat([angles, angles], -1)
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
