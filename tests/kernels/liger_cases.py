"""Every operation that Liger runs, how far it is from torch in float64, and what it must leave alone."""

from collections.abc import Callable
from typing import Any

import torch

from kvtrain.kernels.cross_entropy import linear_cross_entropy_sum
from kvtrain.kernels.mlp import swiglu
from kvtrain.kernels.norm import rms_norm
from kvtrain.kernels.rope import apply_rotary, rotary_angles

Call = Callable[..., torch.Tensor]


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def outcome(call: Call, inputs: list[torch.Tensor], trained: list[bool], **options: Any) -> list[torch.Tensor]:
    """Output and gradients, of a backward pass that runs twice; inputs and gradients must stay as they were."""
    leaves = [tensor.clone().requires_grad_(train) for tensor, train in zip(inputs, trained, strict=True)]
    kept = [leaf.detach().clone() for leaf in leaves]
    result = call(*leaves, **options)
    # Laid out as the result, where a kernel could write over it, then with gaps, as part of a wider gradient.
    factors = torch.empty_like(result).copy_(normal(*result.shape, seed=9, dtype=torch.float32))
    before = factors.clone()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    first = torch.autograd.grad(result, wanted, factors, retain_graph=True)
    second = torch.autograd.grad(result, wanted, torch.stack([factors, factors], -1)[..., 0])
    assert all(map(torch.allclose, first, second)), "a second backward pass differs"
    assert torch.equal(factors, before), "the incoming gradient was overwritten"
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, kept, strict=True)), "an input was overwritten"
    return [result.detach(), *first]


def error(call: Call, inputs: list[torch.Tensor], trained: list[bool] | None = None) -> list[float]:
    """Relative errors of output and gradients against torch in float64."""
    trained = [True] * len(inputs) if trained is None else trained
    found = outcome(call, inputs, trained, backend="liger")
    exact = outcome(call, [tensor.double() for tensor in inputs], trained, backend="torch")
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    return [((ours.double() - true).norm() / true.norm()).item() for ours, true in zip(found, exact, strict=True)]


def norm(hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    return rms_norm(hidden, weight, 1e-5, **options)


def rotary(heads: torch.Tensor, **options: Any) -> torch.Tensor:
    frequencies = 100.0 ** -(torch.arange(3, dtype=torch.float64) / 3)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 90, 91, 92]])
    dtype = torch.promote_types(heads.dtype, torch.float32)
    angles = (angle.to(heads.device, dtype) for angle in rotary_angles(frequencies, positions, torch.float64))
    return apply_rotary(heads, *angles, halves_repeat=True, **options)


def loss(hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    targets = torch.randint(0, 37, hidden.shape[:1], generator=torch.Generator().manual_seed(3))
    targets[[2, 7]] = -100
    return linear_cross_entropy_sum(hidden, weight, targets.to(hidden.device), **options)


def mixed_loss(hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=options["backend"] == "liger"):
        return loss(hidden, weight, **options)


def errors(dtype: torch.dtype, device: str = "cpu") -> dict[str, list[float]]:
    """Of every operation, in odd shapes."""
    hidden, weight = (
        normal(2, 5, 3, 7, seed=0, dtype=dtype, device=device),
        normal(7, seed=1, dtype=dtype, device=device),
    )
    turned = normal(2, 5, 3, 6, seed=2, dtype=dtype, device=device).transpose(1, 2)  # as projections leave them
    factors = [normal(*shape, seed=4, dtype=dtype, device=device) for shape in ((13, 8), (37, 8))]
    # As many chunks as would lose digits if they were summed in a half type.
    many = [normal(64, 2, seed=seed, dtype=dtype, device=device) for seed in (6, 7)]
    found = {
        "norm": error(norm, [hidden, weight]),
        "norm, transposed": error(norm, [hidden.transpose(1, 2), weight]),
        "norm, weight frozen": error(norm, [hidden, weight], [True, False]),
        "rotary": error(rotary, [turned]),
        "rotary, one head": error(rotary, [turned[:, :1]]),
        "loss": error(loss, factors),
        "loss, head frozen": error(loss, factors, [True, False]),
        "loss, hidden frozen": error(loss, factors, [False, True]),
        "loss, many chunks": error(loss, [many[0].abs(), many[1]]),
    }
    if dtype != torch.bfloat16 or device != "cpu":  # of which Triton's interpreter cannot multiply two
        found["gate"] = error(swiglu, [hidden, hidden.flip(0)])
        found["gate, transposed"] = error(swiglu, [hidden.mT, hidden.flip(0).mT])
    return found


def autocast_errors(device: str = "cpu") -> list[float]:
    """Of the loss in bfloat16, its factors in float32."""
    factors = [normal(*shape, seed=4, dtype=torch.float32, device=device) for shape in ((13, 8), (37, 8))]
    return error(mixed_loss, factors)


def refusals(device: str = "cpu") -> dict[str, str]:
    """What a gradient of a gradient, and a target out of range, are answered with."""
    answers = {}
    hidden, weight = (normal(4, 6, seed=s, dtype=torch.float32, device=device).requires_grad_() for s in (0, 1))
    targets = torch.tensor([0, 1, 2, -100], device=device)
    angles = [torch.ones(1, 2, 6, device=device)] * 2
    calls = {
        "norm": rms_norm(hidden, weight[0], 1e-5, backend="liger"),
        "gate": swiglu(hidden, weight, backend="liger"),
        "rotary": apply_rotary(hidden.view(1, 2, 2, 6), *angles, halves_repeat=True, backend="liger"),
        "loss": linear_cross_entropy_sum(hidden, weight, targets, backend="liger"),
    }
    for name, result in calls.items():
        (grad,) = torch.autograd.grad(result.square().sum(), hidden, create_graph=True)
        answers[name] = refusal(lambda g=grad: g.sum().backward())
    for wrong in (4, -1):
        astray = targets.masked_fill(targets == 2, wrong)
        answers[f"target {wrong}"] = refusal(
            lambda t=astray: linear_cross_entropy_sum(hidden, weight, t, backend="liger")
        )
    return answers


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as answer:
        return str(answer)
    return "nothing"
