"""The packaged host and what its retrofits are, in float32 on one thread: models that serving is measured with."""

from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import kvtrain
from kvtrain.assets import resolve
from tests.hosts import dmc_at_rate

METHODS = ("full", "full 8 bit", "dmc 4x", "duo", "lckv w2", "cla2", "transnormer")

# What makes the host wait for the device: a value is read, or a shape follows from values.
_QUESTIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def plain_host() -> Any:
    """The packaged model, as transformers opens it."""
    path = resolve("kvtrain:tiny")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``(rows, tokens)`` without special ones."""
    return torch.randint(2, 4096, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def make_model(method: str) -> Any:
    """One of ``METHODS``; none is trained, which arithmetic and bytes do not mind.

    DMC merges 3 of 4 tokens by a threshold, so that decisions follow from tokens. In Duo half the heads keep all.
    """
    host = plain_host()
    heads, layers = host.config.num_key_value_heads, host.config.num_hidden_layers
    match method:
        case "full":
            model = kvtrain.retrofit(host, kvtrain.Full())
        case "full 8 bit":
            model = kvtrain.retrofit(host, kvtrain.Full(kv_bits=8))
        case "dmc 4x":
            model = dmc_at_rate(host, 0.75, random_ids(2, 200, seed=1))
        case "duo":
            full_heads = [list(range(heads // 2))] * layers
            model = kvtrain.retrofit(host, kvtrain.Duo(sink=16, recent=64, full_heads=full_heads))
        case "lckv w2":
            model = kvtrain.retrofit(host, kvtrain.LCKV(kv_map="lckv-w2"))
        case "cla2":
            model = kvtrain.retrofit(host, kvtrain.LCKV(kv_map="cla2", init="mean"))
        case "transnormer":
            model = _transnormer(host.config)
        case _:
            raise ValueError(f"no method {method!r}; use {', '.join(METHODS)}")
    return model.eval()


def _transnormer(config: Any) -> Any:
    """As wide and deep as the host, with random weights."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name) for name in names}
    torch.manual_seed(0)
    return kvtrain.TransNormerForCausalLM(kvtrain.TransNormerConfig(variant="T2", block_size=64, **sizes))


def read(model: Any, cache: Any, ids: torch.Tensor, chunk: int = 128) -> Any:
    """The cache after prompts ``(B, T)``, read in chunks that keep the peak of memory low."""
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def operator_calls(call: Any) -> tuple[int, int]:
    """Operators that a call runs, and questions to the device among them."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    counts = {event.key: event.count for event in run.key_averages()}
    questions = sum(count for name, count in counts.items() if name in _QUESTIONS)
    return sum(count for name, count in counts.items() if name.startswith("aten::")), questions
