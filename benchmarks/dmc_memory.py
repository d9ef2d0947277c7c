"""What caches of 8,192 tokens take, by their own account and by the process' resident memory.

A small random Llama, float32, one row; DMC merges at random, to 4 tokens a slot. Prints a table, or JSON:

    python benchmarks/dmc_memory.py [--json]
"""

import ctypes
import gc
import json
import sys
from typing import Any

import torch
import transformers

import kvtrain

LENGTH, CHUNK, COMPRESSION = 8192, 512, 4
_M_MMAP_THRESHOLD = -3


def resident_bytes() -> int:
    """Resident memory of this process, freed memory given back first (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def plain_bytes(cache: transformers.DynamicCache) -> int:
    """Bytes that a ``DynamicCache`` allocates."""
    return sum(
        layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in cache.layers
    )


@torch.no_grad()
def measure(model: Any, cache: Any, ids: torch.Tensor) -> dict[str, int]:
    """Fill a cache; its own account, and what the process grew by."""
    model(ids[:, :CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1)  # what is allocated once, is
    own = plain_bytes if isinstance(cache, transformers.DynamicCache) else lambda cache: cache.kv_bytes()
    first, before = own(cache), resident_bytes()
    for part in ids[:, CHUNK:].split(CHUNK, 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return {"cache": own(cache), "process": resident_bytes() - before + first}


def main() -> None:
    """Measure the three caches, one after the other."""
    # Large tensors come from the system and go back to it; otherwise resident memory says little of what is alive.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        vocab_size=512,
    )
    torch.manual_seed(0)
    host = transformers.AutoModelForCausalLM.from_config(config).eval()
    full = kvtrain.retrofit(host, kvtrain.Full())
    dmc = kvtrain.retrofit(host, kvtrain.DMC(compression=COMPRESSION, decisions="random"))
    ids = torch.randint(3, 512, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    caches = {
        "DynamicCache": (host, transformers.DynamicCache(config=config)),
        "Full": (full, full.make_cache()),
        "DMC": (dmc, dmc.make_cache()),
    }
    figures = {name: measure(*pair, ids) for name, pair in caches.items()}
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    for name, sizes in figures.items():
        ratios = {key: sizes[key] / figures["DynamicCache"][key] for key in sizes}
        for key, size in sizes.items():
            print(f"{name:12} {key:8} {size / 2**20:7.2f} MiB  {ratios[key]:.3f} of DynamicCache")


if __name__ == "__main__":
    main()
