"""Peak memory and time of the loss of a linear head, forward and backward, against all logits at once.

4,096 tokens of 2,048 channels, a vocabulary of 128k, bfloat16.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.gpu.measure import Bench, mebibytes, ratio
from benchmarks.gpu.packages import problem_of
from kvtrain.kernels.cross_entropy import linear_cross_entropy_sum
from kvtrain.kernels.distillation import TeacherHead, linear_mixed_sum

TOKENS, WIDTH, VOCABULARY = 4096, 2048, 128 * 1024
WARM_UP, STEPS = 2, 8
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As transformers does: the logits, a copy of them in float32, their softmax."""
    return cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def distilled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Beside the divergence from a teacher with a head of its own."""
    teacher = TeacherHead(hidden.detach().flip(0), weight.detach())
    return linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.5).total


LOSSES: dict[str, Loss] = {
    "torch": partial(linear_cross_entropy_sum, backend="torch"),
    "liger": partial(linear_cross_entropy_sum, backend="liger"),
    "with distillation": distilled,
}


def step(loss_of: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(loss_of(hidden, weight, targets), (hidden, weight))


def compare(bench: Bench, loss_of: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> str:
    """A loss beside the plain one."""
    steps = {"ours": partial(step, loss_of, *tensors), "plain": partial(step, all_at_once, *tensors)}
    steps["ours"]()
    peaks = {name: bench.peak(call) for name, call in steps.items()}
    times = bench.medians(steps, WARM_UP, STEPS)
    return (
        f"{mebibytes(peaks['ours'])}, {1e3 * times['ours']:.1f} ms; "
        f"all logits at once {mebibytes(peaks['plain'])}, {1e3 * times['plain']:.1f} ms; "
        f"of its: time {times['ours'] / times['plain']:.2f}{ratio(peaks['ours'], peaks['plain'])}"
    )


def run(bench: Bench) -> None:
    """A line for every way to compute it."""
    tokens, width, vocabulary = (64, 16, 1024) if bench.small else (TOKENS, WIDTH, VOCABULARY)
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(size, width, dtype=bench.dtype, device=bench.device).requires_grad_()
        for size in (tokens, vocabulary)
    )
    targets = torch.randint(vocabulary, (tokens,), device=bench.device)
    absent = problem_of("liger-kernel") or (None if bench.device.type == "cuda" else "no CUDA device")
    for name, loss_of in LOSSES.items():
        if name == "liger" and absent:
            bench.write(f"  {name}: not run: {absent}")
        else:
            bench.measure(name, partial(compare, bench, loss_of, (hidden, weight, targets)))
