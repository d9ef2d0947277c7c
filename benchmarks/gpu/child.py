"""One section, in a process of its own: its results go to standard output, all else to standard error.

    python -m benchmarks.gpu.child NAME SECONDS SKIP [--cpu]

``machine`` is the head of the results. Ends with 3 where something was left out for want of time, and with 4 where the
device answers no more; then the last line is ``!`` and the number of steps that another process should skip.
"""

import importlib
import os
import sys
from collections.abc import Callable

import torch

from benchmarks.gpu.measure import Bench, DeviceLostError
from benchmarks.gpu.packages import avoid_broken
from benchmarks.gpu.sections import SECTIONS

CUT, LOST = 3, 4


def open_results() -> Callable[[str], None]:
    """A door to standard output, through which nobody else goes from now on."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda line: print(line, file=results, flush=True)


def main(name: str, seconds: str, skip: str, *options: str) -> int:
    """Run a section; returns the exit code."""
    on_cpu, write = "--cpu" in options, open_results()
    if not on_cpu and not torch.cuda.is_available():
        print("torch sees no CUDA device; --cpu runs all of it reduced", file=sys.stderr)
        return 2
    bench = Bench(torch.device("cpu" if on_cpu else "cuda"), float(seconds), write, on_cpu, int(skip))
    if name == "machine":
        importlib.import_module("benchmarks.gpu.machine").run(bench)
        return 0
    section = next(section for section in SECTIONS if section.name == name)
    avoid_broken()
    try:
        importlib.import_module(f"benchmarks.gpu.{section.module}").run(bench, *section.arguments)
    except DeviceLostError:
        write(f"!{bench.step}")
        return LOST
    return CUT if bench.cut else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
