"""One decode step of every method against the plain host with transformers' DynamicCache, on the packaged model.

float32, 512 tokens held a row, CPU time of one thread. All contenders take turns step by step, so that a busy machine
slows them alike; a figure is the median of the steps and, with ``--full``, of three runs. Beside the ratio stand the
operators that a step calls and how often it asks the device for a value, which on a GPU makes the host wait: least and
most of eight steps, since only those that take pages ask.

    python benchmarks/decode_step.py [--full]
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from contenders import METHODS, make_model, operator_calls, plain_host, random_ids, read
from turns import cpu_seconds, decoding, machine, median_seconds

TOKENS, WARM_UP, COUNTED = 512, 5, 8
HOST = "DynamicCache"
BARS = {"full": {1: 0.7, 8: 1.0, 32: 1.4}, "dmc 4x": {1: 0.6, 8: 1.1, 32: 1.7}}


def measure(models: dict[str, Any], rows: int, steps: int) -> tuple[dict[str, float], dict[str, list[tuple[int, int]]]]:
    """Median seconds of a step of each, and what eight further ones call and ask."""
    ids = random_ids(rows, TOKENS)
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        cache = transformers.DynamicCache(config=model.config) if name == HOST else model.make_cache()
        calls[name] = decoding(model, read(model, cache, ids), rows)
    times = median_seconds(calls, WARM_UP, steps, cpu_seconds)
    return times, {name: [operator_calls(call) for _ in range(COUNTED)] for name, call in calls.items()}


def report(rows: int, runs: Sequence[dict[str, float]], counts: dict[str, list[tuple[int, int]]]) -> None:
    """Print a line a contender."""
    print(f"{rows} rows:")
    for name in runs[0]:
        ratios = [times[HOST] / times[name] for times in runs]
        ratio, bar = statistics.median(ratios), BARS.get(name, {}).get(rows)
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(runs) > 1 else ""
        wanted = "" if bar is None else f", at least {bar} wanted{'' if ratio >= bar else ': MISSED'}"
        operators, questions = (sorted(numbers) for numbers in zip(*counts[name], strict=True))
        print(
            f"  {name:12} {1e3 * statistics.median(times[name] for times in runs):6.1f} ms, {ratio:.2f} of its speed"
            f"{spread}{wanted}; {operators[0]:,} to {operators[-1]:,} operators, "
            f"{questions[0]} to {questions[-1]} questions"
        )


@torch.no_grad()
def main() -> None:
    """Print ratios, operators and questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three runs, and 32 rows besides 1 and 8")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {HOST: plain_host(), **{name: make_model(name) for name in arguments.methods}}
    row_counts, repeats, steps = ((1, 8, 32), 3, 30) if arguments.full else ((1, 8), 1, 15)
    print(f"{machine()}; float32, {TOKENS} tokens held a row, median of {steps} steps, {repeats} runs")
    for rows in row_counts:
        runs, counts = zip(*(measure(models, rows, steps) for _ in range(repeats)), strict=True)
        report(rows, runs, counts[0])


if __name__ == "__main__":
    main()
