"""Decoding from the matching cache against transformers' own model with its ``DynamicCache``: time and bytes.

A host of 1.1B parameters, bfloat16. A prompt of one row is read and repeated, so that rows cost no reading.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import transformers

from benchmarks.dmc_memory import plain_bytes
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.models import SERVED, make_host, random_ids
from benchmarks.turns import decoding

LENGTHS, ROWS = (2048, 16384), (1, 8, 32)
CHUNK, WARM_UP, STEPS = 2048, 2, 10


def read(model: Any, cache: Any, ids: torch.Tensor) -> Any:
    """A prompt in a cache."""
    for part in ids.split(CHUNK, 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def repeated(model: Any, prompt: Any, rows: int) -> Any:
    """A prompt's cache for so many rows."""
    if isinstance(prompt, transformers.DynamicCache):
        grown = copy.deepcopy(prompt)
    else:
        grown = model.make_cache()
        grown.join(prompt)
    grown.batch_repeat_interleave(rows)
    return grown


Served = tuple[Any, Any]  # a model, and its cache after the prompt


def compare(bench: Bench, served: Callable[[], Served], plain: Callable[[], Served], rows: int) -> str:
    """Steps of both, which take turns; caches grow by them."""
    (model, own), (host, dynamic) = served(), plain()
    theirs, ours = repeated(host, dynamic, rows), repeated(model, own, rows)
    sizes = plain_bytes(theirs) / 2**20, (ours.kv_bytes() - ours.free_bytes()) / 2**20
    calls = {"host": decoding(host, theirs, rows), "method": decoding(model, ours, rows)}
    times = bench.medians(calls, WARM_UP, STEPS)
    return (
        f"{1e3 * times['method']:.1f} ms a step, {rows / times['method']:,.0f} tok/s, {sizes[1]:,.1f} MiB; "
        f"DynamicCache {1e3 * times['host']:.1f} ms, {sizes[0]:,.1f} MiB; "
        f"of DynamicCache's: speed {times['host'] / times['method']:.2f}, memory {sizes[1] / sizes[0]:.2f}"
    )


def serve(make: Callable[[Any], Any], host: Any, ids: torch.Tensor) -> Served:
    """An architecture after the prompt."""
    model = make(host)
    return model, read(model, model.make_cache(), ids)


def serve_plain(host: Any, ids: torch.Tensor) -> Served:
    """The host after it."""
    return host, read(host, transformers.DynamicCache(config=host.config), ids)


@torch.no_grad()
def run(bench: Bench) -> None:
    """A line for every length, architecture and number of rows."""
    host = make_host("1.1B", bench)
    for length in (70,) if bench.small else LENGTHS:
        ids = random_ids(1, length, host)
        plain = cache(partial(serve_plain, host, ids))
        for name, make in SERVED.items():
            served = cache(partial(serve, make, host, ids))
            for rows in (1, 3) if bench.small else ROWS:
                bench.measure(f"{length:,} tokens, {name}, rows {rows}", partial(compare, bench, served, plain, rows))
