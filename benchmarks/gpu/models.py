"""Hosts of two published sizes with random weights, and what kvtrain makes of them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

import kvtrain
from benchmarks.gpu.measure import Bench


class Shape(NamedTuple):
    """Sizes of a Llama."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool


SHAPES = {
    "0.15B": Shape(768, 18, 12, 12, 2048, 32000, True),
    "1.1B": Shape(2048, 22, 32, 4, 5632, 32000, False),  # TinyLlama's
}
TINY = Shape(32, 4, 4, 2, 48, 100, True)
WINDOW = {"sink": 128, "recent": 256}
COMPRESSION = 4


def make_host(name: str, bench: Bench) -> Any:
    """A Llama of a size, or a tiny one, on the device."""
    shape = TINY if bench.small else SHAPES[name]
    config = transformers.LlamaConfig(**shape._asdict(), max_position_embeddings=32768)
    torch.manual_seed(0)
    with bench.device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=bench.dtype).eval()


def retrofitted(host: Any, method: Any) -> Any:
    """On the weights of the host; what is new lies beside them."""
    return kvtrain.retrofit(host, method).to(host.device)


def full(host: Any) -> Any:
    """The host through kvtrain's kernels."""
    return retrofitted(host, kvtrain.Full())


def dmc(host: Any) -> Any:
    """Merging at random at a fixed rate: nothing is trained here."""
    return retrofitted(host, kvtrain.DMC(compression=COMPRESSION, decisions="random"))


def learning_dmc(host: Any) -> Any:
    """Deciding by what is learnt, about every other token to merge."""
    return retrofitted(host, kvtrain.DMC(compression=COMPRESSION, init_bias=0.0))


def lckv(host: Any) -> Any:
    """One layer of its own at each end, one memory for the rest."""
    return retrofitted(host, kvtrain.LCKV(kv_map="lckv-w2"))


def duo(host: Any) -> Any:
    """Half of the heads stream, chosen at random."""
    model = retrofitted(host, kvtrain.Duo(**WINDOW))
    shape = (host.config.num_hidden_layers, host.config.num_key_value_heads)
    return model.binarize(0.5, gates=torch.rand(shape, generator=torch.Generator().manual_seed(1)))


def gated_duo(host: Any) -> Any:
    """Gates half open, which alone are trained, on weights of its own: the host's go on training."""
    model = retrofitted(copy.deepcopy(host), kvtrain.Duo(**WINDOW))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".gates"))
        if name.endswith(".gates"):
            torch.nn.init.constant_(parameter, 0.7)
    return model


def transnormer(host: Any) -> Any:
    """As wide and deep as the host."""
    sizes = {name: getattr(host.config, name) for name in Shape._fields if name != "num_key_value_heads"}
    torch.manual_seed(0)
    with host.device:
        model = kvtrain.TransNormerForCausalLM(kvtrain.TransNormerConfig(**sizes, hidden_dropout=0.0))
    return model.to(host.dtype).eval()


SERVED: dict[str, Callable[[Any], Any]] = {
    "Full": full,
    "DMC": dmc,
    "LCKV": lckv,
    "Duo": duo,
    "TransNormer": transnormer,
}


def random_ids(rows: int, length: int, host: Any) -> torch.Tensor:
    """Tokens ``(rows, length)`` on the host's device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, host.config.vocab_size, (rows, length), generator=generator).to(host.device)


def billions(model: Any) -> str:
    """Parameters, in words."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f}B"
