"""What it costs a cache that serves to let rows come and go, and to read a prompt beside other rows.

Packaged model, float32, CPU time of one thread; caches have reserved their memory (``preallocate=True``). A row of 512
tokens joins and leaves where 4 rows of 512 tokens are held, and where 32 of 2,048 are: it shall cost at most twice as
much there, and a quarter of a decode step of those that are held. ``leave`` drops the row, ``empty`` forgets what it
holds and keeps it for the next. Then one row reads a prompt in chunks beside the 32, in turns with the same chunks in
a cache of its own: at most 1.15 times the time.

    python benchmarks/serving_cache.py [--full]
"""

import argparse
import statistics
from typing import Any

import torch
from contenders import METHODS, make_model, random_ids, read
from turns import cpu_seconds, decoding, machine, median_seconds

BUDGET, JOINING, READ, CHUNK = 2**30, 512, 100, 20
MOVES = ("join", "leave", "empty")
GROWTH, SHARE, BESIDE = 2.0, 0.25, 1.15


def hold(model: Any, rows: int, tokens: int) -> Any:
    """A cache that holds so many equal rows."""
    cache = model.make_cache(BUDGET, preallocate=True)
    prompt = read(model, model.make_cache(), random_ids(1, tokens), 256)
    for _ in range(rows):
        cache.join(prompt)
    return cache


def moves(cache: Any, joining: Any, repeats: int) -> dict[str, float]:
    """Median seconds that a row takes to join, leave and be emptied."""
    new, times = cache.num_rows, {name: list[float]() for name in MOVES}
    for _ in range(repeats):
        times["join"].append(cpu_seconds(lambda: cache.join(joining)))
        times["leave"].append(cpu_seconds(lambda: cache.free_rows([new])))
        cache.join(joining)
        times["empty"].append(cpu_seconds(lambda: cache.clear_rows([new])))
        cache.free_rows([new])
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def chunk_ratio(model: Any, cache: Any, repeats: int) -> tuple[float, float]:
    """Seconds of a chunk of a new row beside those of the cache, and of the same chunk alone."""
    ids = random_ids(1, READ + CHUNK * (repeats + 2), seed=3)
    new, alone = cache.admit(1)[0], model.make_cache(BUDGET, preallocate=True)

    def feed(target: Any, part: torch.Tensor) -> None:
        model(part, past_key_values=target, prefill=True, use_cache=True, logits_to_keep=1)

    def feed_beside(part: torch.Tensor) -> None:
        with cache.rows([new]):
            feed(cache, part)

    feed_beside(ids[:, :READ])
    feed(alone, ids[:, :READ])
    parts = {name: iter(ids[:, READ:].split(CHUNK, 1)) for name in ("beside", "alone")}
    calls = {"beside": lambda: feed_beside(next(parts["beside"])), "alone": lambda: feed(alone, next(parts["alone"]))}
    times = median_seconds(calls, 2, repeats, cpu_seconds)
    cache.free_rows([new])
    return times["beside"], times["alone"]


def measure(name: str, sizes: tuple[tuple[int, int], tuple[int, int]], repeats: int) -> None:
    """Print what one method costs."""
    model, found = make_model(name), []
    joining = read(model, model.make_cache(), random_ids(1, JOINING, seed=2), 256)
    for rows, tokens in sizes:
        cache = hold(model, rows, tokens)
        steps = median_seconds({"step": decoding(model, cache, rows)}, 2, repeats, cpu_seconds)
        found.append({**steps, **moves(cache, joining, repeats)})
    few, many = found
    print(
        f"{name}: a step of {sizes[0][0]} rows {1e3 * few['step']:.1f} ms, of {sizes[1][0]} {1e3 * many['step']:.1f} ms"
    )
    for move in MOVES:
        growth, share = many[move] / few[move], many[move] / many["step"]
        missed = ": MISSED" if growth > GROWTH or share > SHARE else ""
        print(
            f"  {move:6} {1e3 * few[move]:.2f} and {1e3 * many[move]:.2f} ms: {growth:.2f} times "
            f"(at most {GROWTH:g}), {share:.3f} of a step (at most {SHARE:g}){missed}"
        )
    beside, alone = chunk_ratio(model, cache, 2 * repeats)
    missed = ": MISSED" if beside > BESIDE * alone else ""
    print(
        f"  a chunk of {CHUNK} tokens beside {sizes[1][0]} rows {1e3 * beside:.1f} ms, alone {1e3 * alone:.1f} ms: "
        f"{beside / alone:.2f} times (at most {BESIDE}){missed}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    """Print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every method, and 32 rows of 2,048 tokens, not of 512")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = ((4, 512), (32, 2048 if arguments.full else 512))
    methods = arguments.methods or (METHODS if arguments.full else ("full", "dmc 4x"))
    print(f"{machine()}; held: {', '.join(f'{rows} x {tokens:,} tokens' for rows, tokens in sizes)}; {JOINING} join")
    for name in methods:
        measure(name, sizes, 15 if arguments.full else 7)


if __name__ == "__main__":
    main()
