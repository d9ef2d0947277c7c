"""A training step of every architecture against transformers' own of the plain host: time and memory.

Forward and backward, no optimizer, bfloat16, one row. A step of Duo is its teacher's pass and its student's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure import Bench, mebibytes, ratio
from benchmarks.gpu.models import (
    COMPRESSION,
    billions,
    full,
    gated_duo,
    lckv,
    learning_dmc,
    make_host,
    random_ids,
    transnormer,
)
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.compression import compression_hinge, free_to_merge, merged_fraction
from kvtrain.losses.distillation import Distillation
from kvtrain.models.dmc.attention import DMCStep
from kvtrain.models.duo.attention import DuoStep

LENGTHS = (2048, 4096)
WARM_UP, STEPS = 3, 10


def plain_loss(model: Any, ids: Tensor) -> Tensor:
    """Next-token loss."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def dmc_loss(model: Any, ids: Tensor) -> Tensor:
    """With noise in the decisions, and the pull towards the target."""
    outputs: dict[int, Tensor] = {}
    rows = torch.arange(len(ids), device=ids.device)
    loss = model(input_ids=ids, labels=ids, use_cache=False, outputs=outputs, step=DMCStep(row_ids=rows)).loss
    merged = merged_fraction(outputs.values(), free_to_merge(torch.ones_like(ids)))
    total: Tensor = loss + compression_hinge(merged, COMPRESSION)
    return total


def duo_loss(model: Any, ids: Tensor) -> Tensor:
    """Come close to what the model says with all gates open."""
    step = DuoStep(full_attention=True)
    with torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, skip_logits=True, step=step).last_hidden_state
    teacher = TeacherHead(hidden, model.lm_head.weight)
    kwargs = {"teacher": teacher, "distillation": Distillation(of="hidden"), "step": DuoStep(step=0)}
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss
    return loss


Loss = Callable[[Any, Tensor], Tensor]
TRAINED: dict[str, tuple[Callable[[Any], Any], Loss]] = {
    "DMC": (learning_dmc, dmc_loss),
    "LCKV": (lckv, plain_loss),
    "Duo": (gated_duo, duo_loss),
    "TransNormer": (transnormer, plain_loss),
    "Full": (full, plain_loss),
}


def step(model: Any, ids: Tensor, loss_of: Loss) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    loss_of(model, ids).backward()


def compare(bench: Bench, host: Any, length: int, make: Callable[[Any], Any], loss_of: Loss) -> str:
    """A method's step beside the host's, whose weights it may share."""
    host.zero_grad(set_to_none=True)
    model, ids, peaks = make(host).train(), random_ids(1, length, host), {}
    steps = {"host": partial(step, host, ids, plain_loss), "method": partial(step, model, ids, loss_of)}
    for name, trained in (("host", host), ("method", model)):
        steps[name]()  # what is compiled and chosen once is no part of a step
        trained.zero_grad(set_to_none=True)
        peaks[name] = bench.peak(steps[name])
        trained.zero_grad(set_to_none=True)
    times = bench.medians(steps, WARM_UP, STEPS)
    ours, theirs = times["method"], times["host"]
    return (
        f"{1e3 * ours:.1f} ms, {length / ours:,.0f} tok/s, {mebibytes(peaks['method'])}, {billions(model)}; "
        f"host {1e3 * theirs:.1f} ms, {mebibytes(peaks['host'])}, {billions(host)}; "
        f"of the host's: time {ours / theirs:.2f}{ratio(peaks['method'], peaks['host'])}"
    )


def run(bench: Bench, size: str) -> None:
    """A line for every length and architecture."""
    host = make_host(size, bench).train()
    for length in (160,) if bench.small else LENGTHS:
        for name, (make, loss_of) in TRAINED.items():
            compared = partial(compare, bench, host, length, make, loss_of)
            bench.measure(f"{'tiny' if bench.small else size}, {length:,} tokens, {name}", compared)
