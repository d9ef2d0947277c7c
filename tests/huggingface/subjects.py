"""The models that transformers' tests are run on, and what these want to know of them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import kvtrain
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.host import retrofitted_class
from kvtrain.models.method import Method
from tests.hosts import EXPERT_FAMILIES, FAMILIES, FAMILY_SETTINGS

BATCH, LENGTH, VOCAB = 13, 7, 99
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Subject:
    """A model to be tested: its class, a new configuration each time, and hidden states without a single value."""

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    iterated: tuple[int, ...] = ()


def host_config(family: str, layers: int) -> PreTrainedConfig:
    """Of a decoder as small as their own."""
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    windows = {"sliding_window": None} if family == "mistral" else {}
    experts = {**FAMILY_SETTINGS[family], "router_aux_loss_coef": 1e-3} if family in EXPERT_FAMILIES else {}
    return FAMILIES[family](**COMMON, **sizes, **windows, **experts, max_position_embeddings=512)


def host(family: str) -> Subject:
    """A plain decoder, the control: what fails here says nothing about us."""
    model_class = AutoModelForCausalLM._model_mapping[FAMILIES[family]]
    return Subject("host", model_class, lambda: host_config(family, 2))


def retrofit(
    family: str, method: Method, layers: int = 2, iterated: tuple[int, ...] = (), name: str | None = None
) -> Subject:
    """A decoder with a method in it."""

    def config() -> KVTrainConfig:
        return KVTrainConfig(text_config=host_config(family, layers), method_config=method.to_dict())

    return Subject(name or method.name, retrofitted_class(host_config(family, layers)), config, iterated)


def transnormer(variant: str) -> Subject:
    """A model without a host."""
    sizes = {**COMMON, "num_hidden_layers": 2, "intermediate_size": 48}
    config = kvtrain.TransNormerConfig
    return Subject(
        "transnormer", kvtrain.TransNormerForCausalLM, lambda: config(variant=variant, block_size=4, **sizes)
    )


SUBJECTS = {
    subject.name: subject
    for subject in (
        host("llama"),
        retrofit("llama", kvtrain.Full()),
        retrofit("qwen3_moe", kvtrain.Full(), name="experts"),
        retrofit("qwen3", kvtrain.DMC(init_bias=0.0)),  # about half of the tokens merge
        retrofit("qwen3", kvtrain.DMS(window=2, init_bias=-1.0)),  # every token is marked
        retrofit("mistral", kvtrain.LCKV(kv_map="lckv-w2"), layers=4, iterated=(2,)),
        retrofit("llama", kvtrain.Duo(full_heads=((0,), (1,)), sink=2, recent=4)),
        retrofit("qwen3", kvtrain.Hybrid(linear_layers=(1,))),
        transnormer("T2"),
    )
}


class Tester(SimpleNamespace):
    """What transformers call a model tester: inputs, a configuration, and the sizes of both."""

    def __init__(self, subject: Subject) -> None:
        config = subject.config()
        sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        known = {"batch_size": BATCH, "seq_length": LENGTH, "vocab_size": VOCAB, "is_training": True, **sizes}
        super().__init__(**known, causal_lm_class=subject.model_class, get_config=subject.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """Rows of one real token, of two, of three ..., the padding on the right, as in their own."""
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}
