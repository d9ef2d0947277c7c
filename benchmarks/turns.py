"""Timing side by side: contenders take turns, so that a busy machine slows them alike."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def wall_seconds(call: Callable[[], Any]) -> float:
    """What a call takes by the clock on the wall."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cpu_seconds(call: Callable[[], Any]) -> float:
    """What a call takes of this thread's time; waiting for others on a busy machine does not count."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def median_seconds(
    contenders: Mapping[str, Callable[[], Any]],
    warm_up: int,
    steps: int,
    clock: Callable[[Callable[[], Any]], float] = wall_seconds,
) -> dict[str, float]:
    """Median seconds of a call of each contender, after some that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(warm_up + steps):
        for name, call in contenders.items():
            seconds = clock(call)
            if step >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def at_most(ratio: float, bar: float | None) -> str:
    """What is said behind a ratio that should not be above a bar, if there is one."""
    return "" if bar is None else f", at most {bar} wanted{'' if ratio <= bar else ': MISSED'}"


def decoding(model: Any, cache: Any, rows: int) -> Callable[[], Any]:
    """A call that feeds one token a row; the cache grows by it."""
    token = torch.full((rows, 1), 7, device=model.device)
    return lambda: model(token, past_key_values=cache, use_cache=True)


def decoding_lines(times: Mapping[str, float], caches: Mapping[str, Any], rows: int) -> str:
    """A line a contender: time, speed and, where the cache knows them, bytes."""
    lines = []
    for name, seconds in times.items():
        size = f", {caches[name].kv_bytes() / 2**20:.1f} MiB" if hasattr(caches[name], "kv_bytes") else ""
        lines.append(f"  {name:12} {1e3 * seconds:6.1f} ms a step, {rows / seconds:6.0f} tok/s{size}")
    return "\n".join(lines)


def machine() -> str:
    """What the figures were measured on, in a few words."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
