"""The engine against transformers' continuous batching and static batches, on the packaged model in the same bytes.

Everything runs in float32 on one thread; speeds are of CPU time of the process, contenders in turns.

* *Requests in flight* in the bytes of 8 plain requests, the median over the steps at which others wait. The bar is 0.9
  of what the method's own bytes allow; both are bytes held by whole requests, plain ones with tables and all.
* *New tokens a second* in the same bytes. Continuous batching is tuned first, over its page size and the tokens of a
  batch, on a part of the load; static batches have 8 rows, which is what fits.
* *Latency* by the clock on the wall: requests of mixed lengths come evenly, at half the speed at which the engine has
  just served the load.
* *HTTP*: the same requests asked of the engine and of a server over it, which live in a process of their own; clients
  are in another one. The same percentiles, and what HTTP adds to the process's CPU time where all come at once, 10 %
  at most: for the same requests, and for short prompts with longer answers, where decoding dominates.
* *A crowd*: prompts of 40 tokens, all at once, against the same model reading them in batches of 16.

    python benchmarks/serve.py [--full]
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from contenders import make_model, plain_host, random_ids
from latency import watch
from loads import Load, Served, first_tokens, read_in_batches, serve, serve_continuously, serve_in_batches
from over_http import Measured
from turns import machine

from kvtrain.inference.engine import Engine, Limits, Request

PLAIN, COMPRESSED, ROWS = "full", ("dmc 4x", "duo", "lckv w2"), 8
SHARE, PREEMPTED, HTTP = 0.9, 0.05, 0.1
PAGE_SIZES, BATCH_TOKENS = (32, 128), (64, 128, 256, 512)
CROWD, CROWD_TOKENS, CROWD_ROWS = 100, 40, 16
DECODING = (40, 16, 64)  # requests, tokens of each prompt, new tokens: decoding dominates


def make_load(requests: int, prompt: int, new: int) -> Load:
    """Equal requests of random tokens."""
    return Load(random_ids(requests, prompt, seed=5).tolist(), new)


def plain_request_bytes(full: Any, load: Load) -> int:
    """What one whole request holds where every key and value is kept."""
    one = Load(load.prompts[:1], load.new_tokens)
    return round(serve(full, one, 2**30).request_bytes)


def in_flight(models: dict[str, Any], load: Load) -> dict[str, Served]:
    """Serve a load with every method in the bytes of some plain requests, and print how many ran at a time."""
    plain = plain_request_bytes(models[PLAIN], load)
    length = f"{len(load.prompts[0])} + {load.new_tokens}"
    print(f"{len(load.prompts)} requests of {length} tokens in {ROWS * plain / 2**20:.1f} MiB, {ROWS} plain ones")
    results = {}
    for name, model in models.items():
        results[name] = result = serve(model, load, ROWS * plain)
        bar = SHARE * ROWS * plain / result.request_bytes
        missed = result.median_in_flight < bar or result.preemptions > PREEMPTED * len(load.prompts)
        print(
            f"  {name:8} {result.request_bytes / 2**20:5.2f} MiB a request ({plain / result.request_bytes:.2f} times "
            f"fewer): {result.median_in_flight:g} in flight, at least {bar:.1f} wanted, at most "
            f"{max(result.in_flight)}; {result.preemptions} preempted{': MISSED' if missed else ''}; "
            f"{load.tokens / result.seconds:.0f} new tok/s",
            flush=True,
        )
    return results


def tune(host: Any, load: Load, budget: int) -> tuple[int, int]:
    """Page size and tokens of a batch with which continuous batching is fastest; prints all."""
    part, speeds = Load(load.prompts[: 2 * ROWS], load.new_tokens // 2), {}
    for size, tokens in itertools.product(PAGE_SIZES, BATCH_TOKENS):
        seconds = serve_continuously(host, part, _blocks(host, budget, size), size, tokens)
        speeds[size, tokens] = part.tokens / seconds
    print("continuous batching, new tok/s by page size and tokens of a batch: ", end="")
    print(", ".join(f"{size}/{tokens} {speed:.0f}" for (size, tokens), speed in speeds.items()), flush=True)
    return max(speeds, key=lambda setting: speeds[setting])


def _blocks(host: Any, budget: int, page_size: int) -> int:
    """Blocks of all layers that a budget holds."""
    config = host.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * host.dtype.itemsize
    return int(budget // (page_size * token))


def throughput(models: dict[str, Any], host: Any, load: Load, turns: int) -> float:
    """Print speeds in the same bytes; returns the requests a second of the last method."""
    budget = ROWS * plain_request_bytes(models[PLAIN], load)
    size, tokens = tune(host, load, budget)
    contenders: dict[str, Callable[[], float]] = {
        "continuous": lambda: serve_continuously(host, load, _blocks(host, budget, size), size, tokens),
        "static": lambda: serve_in_batches(host, load, ROWS),
        **{name: _serving(model, load, budget) for name, model in models.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, call in contenders.items():
            seconds[name].append(call())
    speeds = {name: load.tokens / statistics.median(times) for name, times in seconds.items()}
    print(f"new tok/s in {budget / 2**20:.1f} MiB, median of {turns}, continuous batching with {size}/{tokens}:")
    for name, speed in speeds.items():
        print(
            f"  {name:10} {speed:5.0f} tok/s, {speed / speeds['continuous']:.2f} of continuous batching, "
            f"{speed / speeds['static']:.2f} of static batches of {ROWS}"
        )
    return speeds[name] / load.new_tokens


def _serving(model: Any, load: Load, budget: int) -> Callable[[], float]:
    return lambda: serve(model, load, budget).seconds


def mixed(load: Load) -> list[Request]:
    """Requests whose prompts are a quarter, a half, three quarters or all of a load's."""
    return [
        Request(prompt[: max(8, len(prompt) * (1 + number % 4) // 4)], max_new_tokens=load.new_tokens, ignore_eos=True)
        for number, prompt in enumerate(load.prompts)
    ]


def equal(load: Load) -> list[Request]:
    """A load as requests."""
    return [Request(prompt, max_new_tokens=load.new_tokens, ignore_eos=True) for prompt in load.prompts]


def latency(name: str, model: Any, load: Load, budget: int, rate: float) -> None:
    """Print what readers wait for where requests of mixed lengths come at a rate."""
    requests = mixed(load)
    with Engine(model, None, budget) as engine:
        result = watch(engine.submit, requests, 1 / rate)
    print(f"{name}, engine alone, {len(requests)} requests, {rate:.2f} a second, {result.seconds:.0f} s on the wall:")
    print(result.lines())


def http(name: str, load: Load, budget: int, rate: float, turns: int) -> None:
    """Print what readers over HTTP wait for, and what HTTP takes besides the engine."""
    with closing(Measured(name, budget)) as measured:
        ways = {"engine alone": measured.alone, "over HTTP": measured.over_http}
        for way, visit in ways.items():
            result = visit(mixed(load), 1 / rate).latencies
            print(f"{name}, {way}, {rate:.2f} requests a second, {result.seconds:.0f} s on the wall:\n{result.lines()}")
        http_cost(f"{name}, mixed prompts", mixed(load), measured, turns)
        http_cost(f"{name}, {DECODING[1]} + {DECODING[2]} tokens", equal(make_load(*DECODING)), measured, turns)


def http_cost(name: str, requests: Sequence[Request], measured: Measured, turns: int) -> None:
    """Print what HTTP adds to the engine's CPU time where all requests come at once."""
    alone, over = list[float](), list[float]()
    for _ in range(turns + 1):
        alone.append(measured.alone(requests, 0.0).seconds)
        over.append(measured.over_http(requests, 0.0).seconds)
    took, added = statistics.median(alone[1:]), statistics.median(over[1:]) - statistics.median(alone[1:])
    tokens = sum(request.max_new_tokens for request in requests)
    print(
        f"{name}, all at once: {tokens / took:.0f} new tok/s of CPU time alone, {tokens / (took + added):.0f} over "
        f"HTTP, which adds {added / took:.1%} and {1e6 * added / tokens:.0f} us a token "
        f"(at most {HTTP:.0%}){': MISSED' if added > HTTP * took else ''}",
        flush=True,
    )


def crowd(name: str, model: Any, turns: int) -> None:
    """Print when the last of many short prompts has its first token."""
    load = Load(random_ids(CROWD, CROWD_TOKENS, seed=6).tolist(), 16)
    limits, firsts, batches = Limits(max_requests=CROWD), [], []
    for _ in range(turns + 1):
        firsts.append(max(first_tokens(model, load, 2**30, limits)))
        batches.append(read_in_batches(model, load.prompts, CROWD_ROWS))
    last, batched = statistics.median(firsts[1:]), statistics.median(batches[1:])
    missed = ": MISSED" if last > 2 * batched else ""
    print(
        f"{name}: {CROWD} prompts of {CROWD_TOKENS} tokens at once, the last first token after {last:.2f} s of CPU "
        f"time; batches of {CROWD_ROWS} are read in {batched:.2f} s: {last / batched:.2f} times (at most 2){missed}"
    )


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="64 requests, longer ones too, every method, three turns")
    parts = ("in-flight", "throughput", "latency", "http", "crowd")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    full, turns = arguments.full, 3 if arguments.full else 1
    models = {name: make_model(name) for name in (PLAIN, *(COMPRESSED if full else COMPRESSED[:1]))}
    print(f"{machine()}; float32; {Limits()}")
    load = make_load(64 if full else 40, 384, 128 if full else 32)
    if "in-flight" in arguments.parts:
        for shape in (load, make_load(64, 768, 256)) if full else (load,):
            in_flight(models, shape)
    chosen, rate = {name: models[name] for name in (PLAIN, COMPRESSED[0])}, 1.0
    if "throughput" in arguments.parts:
        rate = throughput(chosen, plain_host(), load, turns) / 2
    for name, model in chosen.items():
        budget = ROWS * plain_request_bytes(models[PLAIN], load)
        if "latency" in arguments.parts:
            latency(name, model, load, budget, rate)
        if "http" in arguments.parts:
            http(name, load, budget, rate, 2 * turns)
        if "crowd" in arguments.parts:
            crowd(name, model, turns)


if __name__ == "__main__":
    main()
