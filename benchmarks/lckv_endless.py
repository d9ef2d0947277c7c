"""Endless generation with LCKV: a stream of text through a cache of constant size, position by position.

The stream begins and ends with the same held-out text, so that the two ends are equally hard; what lies between is
long enough that nothing of the beginning is left in the cache. Printed are the perplexities of both ends and the
cache's bytes over time.

    kvtrain fit --config recipes/tiny/lckv.yaml && kvtrain export runs/lckv-tiny exported/lckv-tiny
    python benchmarks/lckv_endless.py exported/lckv-tiny
"""

import argparse
import math
import time

import torch
from turns import machine

from kvtrain.data.corpus import read_corpus
from kvtrain.inference.load import open_model

SINK, RECENT, END = 4, 1020, 2000


@torch.no_grad()
def main() -> None:
    """Print perplexities, bytes and speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=20_000)
    asked = parser.parse_args()
    model, tokenizer = open_model(asked.model, dtype=torch.float32)
    text = "\n".join(document.text for document in read_corpus("heldout"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = [*ids[: asked.tokens - END], *ids[:END]]
    cache = model.make_cache(sink=SINK, recent=RECENT)
    losses, sizes, began = [], [], time.perf_counter()
    for place, token in enumerate(stream[:-1]):
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(stream[place + 1])).item())
        if place in (SINK + RECENT, asked.tokens // 2, asked.tokens - 2):
            sizes.append(cache.kv_bytes())
    seconds = time.perf_counter() - began
    first, last = (math.exp(sum(part) / len(part)) for part in (losses[: END - 1], losses[-(END - 1) :]))
    print(f"{machine()}; {len(stream):,} tokens, sink {SINK}, recent {RECENT}, {len(stream) / seconds:,.0f} tok/s")
    print(f"perplexity of the first {END:,} tokens {first:.2f}, ", end="")
    print(f"of the same text at the end {last:.2f}: {last / first:.3f}")
    print(f"bytes once full, half-way and at the end: {', '.join(f'{size:,}' for size in sizes)}")


if __name__ == "__main__":
    main()
