"""Decode steps as one graph, against the same steps without and transformers' DynamicCache, on the packaged model.

512 tokens a row, float32, one thread. DMC merges by a threshold that is moved until about 4 tokens share a slot. The
contenders take turns step by step, so that a busy machine slows them alike; the figures are medians.

    python benchmarks/compiled_step.py [rows]
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from turns import machine, median_seconds

import kvtrain
from kvtrain.assets import resolve
from kvtrain.models.compiled import CompiledStep

LENGTH, COMPRESSION, BUDGET, WARM_UP, STEPS = 512, 4, 1 << 28, 3, 60


def at_rate(model: Any, ids: torch.Tensor) -> None:
    """Move the threshold of all decisions until so many tokens share a slot."""
    low, high = -50.0, 50.0  # a lower threshold merges more
    for _ in range(12):
        bias = (low + high) / 2
        for layer in model.model.layers:
            layer.self_attn.settings = replace(layer.self_attn.settings, init_bias=bias)
        outputs: dict[int, torch.Tensor] = {}
        model(ids, use_cache=False, outputs=outputs)
        merged = torch.stack(list(outputs.values())).mean().item()
        low, high = (bias, high) if merged > 1 - 1 / COMPRESSION else (low, bias)


def eager(model: Any, cache: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """A step of a model that has read a prompt."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1]
    return lambda: model(token, past_key_values=cache, use_cache=True)


def compiled(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """The same as a graph."""
    cache = model.make_cache(BUDGET, preallocate=True)
    model(ids, past_key_values=cache, logits_to_keep=1)
    step, token, begin = CompiledStep(model, cache), ids[:, :1], time.perf_counter()
    step(token)
    print(f"first step of {type(model.method).__name__}: {time.perf_counter() - begin:.0f} s")
    return lambda: step(token)


@torch.no_grad()
def main(rows: int) -> None:
    """Print times and ratios."""
    torch.set_num_threads(1)
    host = transformers.AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny"), dtype=torch.float32).eval()
    ids = torch.randint(2, host.config.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    full, dmc = kvtrain.retrofit(host, kvtrain.Full()), kvtrain.retrofit(host, kvtrain.DMC(compression=COMPRESSION))
    at_rate(dmc, ids)
    calls = {"DynamicCache": eager(host, transformers.DynamicCache(config=host.config), ids)}
    for name, model in (("Full", full), ("DMC", dmc)):
        calls[name] = eager(model, model.make_cache(BUDGET, preallocate=True), ids)
        calls[f"{name}, compiled"] = compiled(model, ids)
    seconds = median_seconds(calls, WARM_UP, STEPS)
    print(f"{machine()}; one thread, {rows} rows of {LENGTH:,} tokens")
    for name, value in seconds.items():
        print(f"{name:16} {1e3 * value:7.2f} ms  {seconds['DynamicCache'] / value:.2f} of DynamicCache's speed")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
