"""Attention probabilities from the log-sum-exp beside the attention that they follow, CPU time of one thread.

Float32, causal. ``sums`` are what every key is given by all queries (H2O's scores of a prompt), ``last rows`` the
probabilities of the latest 64 queries (SnapKV's window). The denominator is torch's flash kernel on the same queries
and keys, forward alone; beside them stand the dense softmax that makes ``[T, T]``, and the same sums as the gradient of
the values (forward pass not counted). Then one query a head over pages, as in a decode step, beside attention to them.
Contenders take turns, so that a busy machine slows them alike.

    python benchmarks/attention_scores.py [--full]
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from turns import at_most, cpu_seconds, machine, median_seconds

from kvtrain.kernels.attention_scores import column_sums, last_rows
from kvtrain.kernels.flash_cpu import flash, flash_backward
from kvtrain.kernels.page_layout import PageLayout
from kvtrain.kernels.paged_attention import paged_attention
from kvtrain.kernels.paged_scores import paged_tiles
from kvtrain.kernels.quantization import quantize

WINDOW, PAGE_SIZE = 64, 32
BARS = {"sums": 1.7, "last rows": 0.2}


class Shape(NamedTuple):
    """One call."""

    rows: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.tokens:,} tokens, {self.heads} heads of {self.dim} over {self.kv_heads}"


PROMPTS = (Shape(1, 8, 8, 1024, 32), Shape(8, 8, 8, 1024, 32))  # the second: kvtrain:tiny
FULL_PROMPTS = (*PROMPTS, Shape(1, 8, 8, 2048, 64), Shape(1, 8, 2, 2048, 64))
STEPS = ((Shape(8, 8, 8, 1024, 32), None), (Shape(8, 8, 8, 1024, 32), 4), (Shape(8, 8, 2, 1024, 32), None))


def normal(*shape: int) -> Tensor:
    """The same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[1]))


def eager(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Sums ``(B, H_kv, T)`` of the dense softmax."""
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)
    scores = (query @ key.repeat_interleave(groups, 1).mT).mul_(scale).masked_fill_(future, -torch.inf)
    return scores.softmax(-1).sum(2).unflatten(1, (-1, groups)).sum(2)


def prompt_contenders(shape: Shape) -> dict[str, Callable[[], Any]]:
    """Calls on one prompt, the denominator first."""
    query = normal(shape.rows, shape.heads, shape.tokens, shape.dim)
    key, value = (normal(shape.rows, shape.kv_heads, shape.tokens, shape.dim) for _ in range(2))
    scale = shape.dim**-0.5
    how: dict[str, Any] = {"causal": True, "mask": None, "scale": scale}
    output, lse = flash(query, key, value, **how)
    ones = torch.ones_like(output)
    torch.testing.assert_close(column_sums(query, key, lse, scale), eager(query, key, scale), atol=1e-4, rtol=1e-4)
    latest = query[:, :, -WINDOW:], key, lse[:, :, -WINDOW:]
    return {
        "flash": lambda: flash(query, key, value, **how),
        "sums": lambda: column_sums(query, key, lse, scale),
        "last rows": lambda: last_rows(*latest, scale),
        "sums of the last rows": lambda: column_sums(*latest, scale),
        "eager": lambda: eager(query, key, scale),
        "flash backward": lambda: flash_backward(ones, query, key, value, output, lse, **how),
    }


def step_contenders(shape: Shape, bits: int | None) -> dict[str, Callable[[], Any]]:
    """Calls on shuffled pages, the denominator first."""
    columns = shape.tokens // PAGE_SIZE
    pages = shape.rows * shape.kv_heads * columns
    query, scale = normal(shape.rows, shape.heads, 1, shape.dim), shape.dim**-0.5
    keys, values = (normal(pages, PAGE_SIZE, shape.dim) for _ in range(2))
    if bits is not None:
        keys, values = quantize(keys, bits), quantize(values, bits)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    table = order.view(shape.rows, shape.kv_heads, columns)
    lengths = torch.full(table.shape[:2], shape.tokens)
    layout = PageLayout(table.flatten(0, 1), pages, PAGE_SIZE, copies=bits is not None)
    how: dict[str, Any] = {"bits": bits, "layout": layout}
    _, lse = paged_attention(query, keys, values, table, lengths, scale, **how)
    positions, sums = torch.full((shape.rows, 1), shape.tokens), torch.zeros(pages, PAGE_SIZE)

    def observe() -> None:
        for tile in paged_tiles(query, keys, lse, scale, table, lengths, positions, **how):
            tile.add(sums, tile.column_sums())

    return {
        "attention over pages": lambda: paged_attention(query, keys, values, table, lengths, scale, **how),
        "sums over pages": observe,
    }


def report(title: str, contenders: dict[str, Callable[[], Any]], steps: int) -> None:
    """Print a line a contender: time, and ratio to the first."""
    times = median_seconds(contenders, 2, steps, cpu_seconds)
    first = next(iter(times.values()))
    print(f"{title}:")
    for name, seconds in times.items():
        ratio = seconds / first
        print(f"  {name:22} {1e3 * seconds:7.1f} ms, {ratio:.2f}{at_most(ratio, BARS.get(name))}")


@torch.no_grad()
def main() -> None:
    """Print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="longer prompts, shared key heads, three times the steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = 15 if arguments.full else 5
    print(f"{machine()}; float32, window of {WINDOW}, median of {steps} calls")
    for shape in FULL_PROMPTS if arguments.full else PROMPTS:
        report(str(shape), prompt_contenders(shape), steps)
    for shape, bits in STEPS:
        held = "float32" if bits is None else f"{bits} bits"
        report(f"a step of {shape}, {held}", step_contenders(shape, bits), 10 * steps)


if __name__ == "__main__":
    main()
