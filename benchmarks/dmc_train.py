"""One training step of DMC against the same step of its plain host, on the packaged model.

Forward, backward, no optimiser; bfloat16 autocast, 4 rows of 1,024 tokens; the median of the timed steps.

    python benchmarks/dmc_train.py
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import kvtrain
from kvtrain.assets import resolve
from kvtrain.losses.compression import compression_hinge, merged_fraction
from kvtrain.models.dmc.attention import DMCStep
from kvtrain.models.host import retrofit
from kvtrain.models.method import Method

ROWS, LENGTH, WARM_UP, STEPS = 4, 1024, 2, 7


def make_step(method: Method) -> Callable[[], None]:
    """A function that runs one forward and backward pass of a fresh model."""
    host = transformers.AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny"), dtype=torch.float32)
    model = retrofit(host, method).train()
    ids = torch.randint(2, model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    documents = torch.ones_like(ids)

    def step() -> None:
        ledger: dict[int, torch.Tensor] = {}
        extra: dict[str, Any] = {}
        if isinstance(method, kvtrain.DMC):
            extra = {"ledger": ledger, "dmc_step": DMCStep(None, 0, 0, torch.arange(ROWS))}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False, document_ids=documents, **extra).loss
            if ledger:
                loss = loss + compression_hinge(merged_fraction(ledger.values(), documents > 0), 4.0)
        loss.backward()

    return step


def median_seconds(step: Callable[[], None]) -> float:
    """Median time of a step after warm-up."""
    times = []
    for number in range(WARM_UP + STEPS):
        began = time.perf_counter()
        step()
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Print both times and their ratio."""
    host, dmc = (median_seconds(make_step(method)) for method in (kvtrain.Full(), kvtrain.DMC(init_bias=0.0)))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"host {host:.3f} s ({ROWS * LENGTH / host:,.0f} tok/s), DMC {dmc:.3f} s ({ROWS * LENGTH / dmc:,.0f} tok/s)")
    print(f"ratio DMC / host: {dmc / host:.2f}")


if __name__ == "__main__":
    main()
