"""One training step of DMC against the same step of its plain host, on the packaged model: time and memory.

Forward, backward, no optimizer; 4 rows of 1,024 tokens. Time is the median of the timed steps, in float32 and under
bfloat16 autocast, where a processor with AMX makes the host's matrix products cheap and DMC's own work weighs more.
Memory is what resident memory grows by at most in one step under autocast, gradients included, in a fresh process each
(Linux).

    python benchmarks/dmc_train.py
    python benchmarks/dmc_train.py --peak dmc    # bytes of one method's step alone
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from dmc_memory import resident_bytes
from turns import machine, median_seconds

import kvtrain
from kvtrain.assets import resolve
from kvtrain.losses.compression import compression_hinge, merged_fraction
from kvtrain.models.dmc.attention import DMCStep
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method
from kvtrain.training.callbacks.memory import peak_resident_bytes

ROWS, LENGTH, WARM_UP, STEPS = 4, 1024, 2, 7
METHODS: dict[str, Method] = {"host": kvtrain.Full(), "dmc": kvtrain.DMC(init_bias=0.0)}


def make_step(method: Method, rows: int = ROWS, length: int = LENGTH, *, autocast: bool = True) -> Callable[[], None]:
    """A function that runs one forward and backward pass of a fresh model."""
    host = transformers.AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny"), dtype=torch.float32)
    model = retrofit(host, method).train()
    ids = torch.randint(2, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    documents = torch.ones_like(ids)

    def step() -> None:
        outputs: dict[int, torch.Tensor] = {}
        extra: dict[str, Any] = {}
        if isinstance(method, kvtrain.DMC):
            extra = {"outputs": outputs, "step": DMCStep(None, 0, 0, torch.arange(rows))}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False, document_ids=documents, **extra).loss
            if outputs:
                loss = loss + compression_hinge(merged_fraction(outputs.values(), documents > 0), 4.0)
        loss.backward()

    return step


def peak_bytes(method: Method) -> int:
    """What this process grows by at most in the first whole step; a small one has loaded what loads once."""
    make_step(method, rows=2, length=64)()
    step = make_step(method)
    before = resident_bytes()
    step()
    return peak_resident_bytes() - before


def peak_of(name: str) -> int:
    """``peak_bytes`` of a method in a process of its own."""
    # Tensors come from the system and go back to it, so that what is freed does not count on.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, __file__, "--peak", name]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(printed.split()[-1])


def main() -> None:
    """Print times, memory and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", choices=METHODS, help="print the bytes that one method's step takes, and no more")
    asked = parser.parse_args().peak
    if asked:
        print(peak_bytes(METHODS[asked]))
        return
    print(machine())
    for precision, autocast in (("float32", False), ("bfloat16 autocast", True)):
        steps = {name: make_step(method, autocast=autocast) for name, method in METHODS.items()}
        times = median_seconds(steps, WARM_UP, STEPS)
        rates = ", ".join(
            f"{name} {seconds:.3f} s ({ROWS * LENGTH / seconds:,.0f} tok/s)" for name, seconds in times.items()
        )
        print(f"{precision}: {rates}; time, DMC / host: {times['dmc'] / times['host']:.2f}")
    host, dmc = (peak_of(name) for name in METHODS)
    print(f"host {host / 2**20:,.0f} MiB, DMC {dmc / 2**20:,.0f} MiB")
    print(f"memory, DMC / host: {dmc / host:.2f}")


if __name__ == "__main__":
    main()
