"""Decoding through DMC's pages against transformers' DynamicCache on the same host, on the packaged model.

8 rows of 2,048 tokens at 4 tokens a slot (random decisions, so that no training is needed), float32. Caches take turns
step by step, so that a busy machine slows them alike; the figures are medians. Then rows leave and join again and
again, so that pages are freed and reused, and the same decoding is timed once more.

    python benchmarks/dmc_decode.py
"""

from typing import Any

import torch
import transformers
from turns import decoding, decoding_lines, machine, median_seconds

import kvtrain
from kvtrain.assets import resolve

ROWS, LENGTH, COMPRESSION, WARM_UP, STEPS, CHURNS = 8, 2048, 4, 5, 40, 16


def prefill(model: Any, cache: Any, ids: torch.Tensor) -> Any:
    """Read the prompts, in chunks that keep the peak of memory low."""
    for part in ids.split(512, 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode(contenders: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Median seconds of a step of each model with its cache, which grows by the steps."""
    calls = {name: decoding(model, cache, ROWS) for name, (model, cache) in contenders.items()}
    return median_seconds(calls, WARM_UP, STEPS)


def churn(model: Any, cache: Any, ids: torch.Tensor) -> int:
    """Let rows leave and new ones join; returns how many pages were freed."""
    freed = 0
    for turn in range(CHURNS):
        leaving = turn % ROWS
        freed += sum(int((layer.pages.table[leaving] >= 0).sum()) for layer in cache.layers)
        cache.free_rows([leaving])
        cache.join(prefill(model, model.make_cache(), ids[leaving : leaving + 1]))
    return freed


@torch.no_grad()
def main() -> None:
    """Print times and ratios."""
    host = transformers.AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny"), dtype=torch.float32).eval()
    full = kvtrain.retrofit(host, kvtrain.Full())
    dmc = kvtrain.retrofit(host, kvtrain.DMC(compression=COMPRESSION, decisions="random"))
    ids = torch.randint(2, host.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    contenders = {
        "DynamicCache": (host, prefill(host, transformers.DynamicCache(config=host.config), ids)),
        "Full": (full, prefill(full, full.make_cache(), ids)),
        "DMC": (dmc, prefill(dmc, dmc.make_cache(), ids)),
    }
    caches = {name: cache for name, (_, cache) in contenders.items()}
    print(f"{machine()}; {ROWS} rows of {LENGTH:,} tokens, {COMPRESSION} tokens a slot")
    first = decode(contenders)
    print(decoding_lines(first, caches, ROWS))
    print(f"ratio tokens/s DMC / DynamicCache: {first['DynamicCache'] / first['DMC']:.2f}")
    fresh = prefill(dmc, dmc.make_cache(), ids)
    freed = churn(dmc, caches["DMC"], ids)
    second = decode({"fresh": (dmc, fresh), "reused": (dmc, caches["DMC"])})
    print(f"after {freed:,} pages were freed and reused: {second['fresh'] / second['reused']:.2f} of a fresh speed")


if __name__ == "__main__":
    main()
