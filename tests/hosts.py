"""Tiny hosts of every supported family, and DMC and DMS models that decide at a chosen rate."""

import copy
import functools
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
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
from kvtrain.models.hosts import whole_layers

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "gemma3_text": Gemma3TextConfig,
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
# The same with layers that see a window of six tokens, but for every second one, which sees everything.
SLIDING: dict[str, type[PreTrainedConfig]] = {
    "gemma3_sliding": Gemma3TextConfig,
    "gpt_oss_sliding": GptOssConfig,
    "qwen2_sliding": Qwen2Config,
}
VOCAB = 61
# Families with experts: five of them, of which a token has two.
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}
GPT_OSS = {**EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
EXPERT_FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    # Every layer sees everything, and scores are not scaled by the width of a head.
    "gemma3_text": {"sliding_window_pattern": 1, "sliding_window": 4096, "query_pre_attn_scalar": 12},
    "gpt_oss": GPT_OSS,
    "gpt_oss_sliding": GPT_OSS,
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16},
    "gemma3_sliding": {"query_pre_attn_scalar": 12},
    "qwen2_sliding": {"use_sliding_window": True},
}
# Families whose attention has learned sinks, which not every method knows.
SINKS = ("gpt_oss", "gpt_oss_sliding")
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
    if family in SLIDING:
        kinds = [f"{('sliding', 'full')[layer % 2]}_attention" for layer in range(layers)]
        settings = {"layer_types": kinds, "sliding_window": 6, **settings}
    if family == "gpt_oss":  # which makes a mask of a window for no layer, too
        settings = {"layer_types": ["full_attention"] * layers, "sliding_window": 128, **settings}
    config = {**FAMILIES, **SLIDING}[family](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{"sliding_window": None, "head_dim": 8, "vocab_size": VOCAB, **FAMILY_SETTINGS.get(family, {}), **settings},
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


def whole_attention(model: PreTrainedModel) -> list[Any]:
    """The attention of the layers that see everything, which is the method's."""
    return [model.model.layers[layer].self_attn for layer in whole_layers(model.config.host_config)]


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without special ones, ``(B, T)``."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def merge_rate(model: PreTrainedModel, ids: Tensor) -> float:
    """Share of decisions that merge, over layers, heads and tokens but the first."""
    outputs: dict[int, Tensor] = {}
    with torch.no_grad():
        model(ids, use_cache=False, outputs=outputs)
    return torch.stack(list(outputs.values()))[..., 1:].mean().item()


def with_random_mixers(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same hybrid, its norms and gates anything but what they begin as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def set_bias(model: PreTrainedModel, bias: float) -> None:
    """Move the threshold of every decision."""
    for attention in whole_attention(model):
        attention.settings = replace(attention.settings, init_bias=bias)


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
    for attention in whole_attention(model):
        weight = attention.dms_proj_alpha.weight
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / scale)
    return model


def exact(host: PreTrainedModel) -> PreTrainedModel:
    """The same host in float64 throughout: transformers computes norms and angles in float32."""
    host = copy.deepcopy(host)
    host.set_experts_implementation("eager")  # the only one that has float64
    centered = host.config.model_type == "gemma3_text"  # its weights of norms are added to 1
    for name, module in host.named_modules():
        if name.endswith("norm"):
            weight, epsilon = module.weight + 1 if centered else module.weight, host.config.rms_norm_eps
            module.forward = functools.partial(_exact_norm, weight, epsilon)
    if centered:
        host.model.embed_tokens.embed_scale = torch.tensor(host.config.hidden_size**0.5, dtype=torch.float64)
    host.model.rotary_emb.forward = functools.partial(_exact_angles, host.model.rotary_emb)
    return host


def _exact_norm(weight: Tensor, epsilon: float, states: Tensor) -> Tensor:
    return weight * states * (states.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _exact_angles(
    rotary: nn.Module, states: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    config, scaling = rotary.config, 1.0
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = rope["rope_theta"] ** -exponents / rope.get("factor", 1.0)
    if rope["rope_type"] not in ("default", "linear"):
        frequencies, scaling = rotary.inv_freq.double(), rotary.attention_scaling
    angles = position_ids.unsqueeze(-1) * frequencies
    if config.model_type != "gpt_oss":  # which turns halves by the same angles, and has them once
        angles = torch.cat([angles, angles], -1)
    return angles.cos() * scaling, angles.sin() * scaling
