"""Decoding with LCKV's shared memory against transformers' DynamicCache, and how many rows a budget holds.

A Llama of 22 layers, float32, random weights: 8 rows of 1,024 tokens decode with the host's own cache, with every key
and value on pages (Full), and with one layer of its own at each end and one memory for the rest (w = 2). Caches take
turns step by step; figures are medians. Then rows of one prompt join until the budget on bytes refuses the next.

    python benchmarks/lckv_decode.py
"""

from typing import Any

import torch
import transformers
from turns import decoding, decoding_lines, machine, median_seconds

import kvtrain
from kvtrain.cache.budget import CacheFullError

ROWS, LENGTH, WARM_UP, STEPS, LAYERS, BUDGET = 8, 1024, 5, 40, 22, 512 * 2**20


def make_host() -> Any:
    """A Llama with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def read(model: Any, cache: Any, ids: torch.Tensor) -> Any:
    """A prompt in a cache."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def rows_that_fit(model: Any, prompt: Any) -> int:
    """Rows of a prompt that join until the budget is used up."""
    cache = model.make_cache(budget=BUDGET)
    try:
        while True:
            cache.join(prompt)
    except CacheFullError:
        return int(cache.num_rows)


@torch.no_grad()
def main() -> None:
    """Print times, rows and ratios."""
    host = make_host()
    full, lckv = (kvtrain.retrofit(host, method) for method in (kvtrain.Full(), kvtrain.LCKV(kv_map="lckv-w2")))
    ids = torch.randint(2, 4096, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    prompts = {model: read(model, model.make_cache(), ids) for model in (full, lckv)}
    contenders: dict[str, tuple[Any, Any]] = {
        "DynamicCache": (host, read(host, transformers.DynamicCache(config=host.config), ids.expand(ROWS, -1)))
    }
    for name, model in (("Full", full), ("LCKV", lckv)):
        cache = model.make_cache()
        for _ in range(ROWS):
            cache.join(prompts[model])
        contenders[name] = (model, cache)
    caches = {name: cache for name, (_, cache) in contenders.items()}
    print(f"{machine()}; {LAYERS} layers, {ROWS} rows of {LENGTH:,} tokens")
    calls = {name: decoding(model, cache, ROWS) for name, (model, cache) in contenders.items()}
    times = median_seconds(calls, WARM_UP, STEPS)
    print(decoding_lines(times, caches, ROWS))
    print(f"ratio tokens/s LCKV / DynamicCache: {times['DynamicCache'] / times['LCKV']:.2f}")
    dynamic = BUDGET // (LENGTH * 2 * LAYERS * 256 * 4)
    fit = {name: rows_that_fit(model, prompts[model]) for name, model in (("Full", full), ("LCKV", lckv))}
    print(f"rows of {LENGTH:,} tokens in {BUDGET / 2**20:.0f} MiB: DynamicCache {dynamic}, ", end="")
    print(f"Full {fit['Full']}, LCKV {fit['LCKV']}: {fit['LCKV'] / dynamic:.1f} times as many")


if __name__ == "__main__":
    main()
