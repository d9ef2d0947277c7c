"""Tokens through a few of many feed-forward layers, against the definition: token by token, expert by expert."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from kvtrain.kernels.cpu_tiling import without_values
from kvtrain.kernels.experts import experts_mlp

from .test_pointwise import normal

EXPERTS, CHOSEN, UNUSED = 6, 2, 3


def problem(tokens: int = 37) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments in float64, and what tokens choose: never one of the experts, and another twice as often as most."""
    tensors = {
        "hidden": normal(tokens, 16, seed=1),
        "weights": normal(tokens, CHOSEN, seed=2).abs(),
        "gate_up": normal(EXPERTS, 48, 16, seed=3) / 4,
        "down": normal(EXPERTS, 16, 24, seed=4) / 5,
    }
    liking = normal(tokens, EXPERTS, seed=5) + torch.tensor([0.0, 0, 1, -100, 0, 0])
    return tensors, liking.topk(CHOSEN).indices


def definition(hidden: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for row, experts, shares in zip(hidden, chosen.tolist(), weights, strict=True):
        parts = [(gate_up[expert] @ row).chunk(2) for expert in experts]
        fed = [down[expert] @ (silu(gate) * up) for expert, (gate, up) in zip(experts, parts, strict=True)]
        rows.append(sum(share * one for share, one in zip(shares, fed, strict=True)))
    return torch.stack(rows)


def interleaved(both: Tensor) -> Tensor:
    """A gate that bounds what passes."""
    gate, up = both[..., ::2], both[..., 1::2]
    return torch.sigmoid(1.7 * gate) * gate.clamp(max=1.0) * (up.clamp(-1.0, 1.0) + 1)


def with_biases(hidden, chosen, weights, gate_up, down, bias_up, bias_down):
    """As gpt-oss: matrices ``(E, in, out)``, biases, and gates and what is gated in turns."""
    biases = bias_up, bias_down
    return experts_mlp(hidden, chosen, weights, gate_up.mT, down.mT, biases=biases, gate=interleaved)


def definition_with_biases(hidden, chosen, weights, gate_up, down, bias_up, bias_down):
    rows = []
    for row, experts, shares in zip(hidden, chosen.tolist(), weights, strict=True):
        fed = [
            interleaved(row @ gate_up[expert] + bias_up[expert]) @ down[expert] + bias_down[expert]
            for expert in experts
        ]
        rows.append(sum(share * one for share, one in zip(shares, fed, strict=True)))
    return torch.stack(rows)


def outcome(function, tensors, chosen, dtype):
    """Result and gradients."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    result = function(chosen=chosen, **leaves)
    loss = (result.double() * normal(*result.shape, seed=9)).sum()
    return [result, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_it_is_the_definition(dtype, tolerance):
    tensors, chosen = problem()
    found, expected = outcome(experts_mlp, tensors, chosen, dtype), outcome(definition, tensors, chosen, torch.float64)
    for ours, naive in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.detach().double() - naive.detach()).abs().max()
        assert error < tolerance * naive.detach().abs().max()
    assert (chosen != UNUSED).all() and not found[3][UNUSED].any() and found[3][UNUSED - 1].all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_biases_transposed_matrices_and_another_gate(dtype, tolerance):
    tensors, chosen = problem()
    tensors |= {"gate_up": tensors["gate_up"].mT.contiguous(), "down": tensors["down"].mT.contiguous()}
    tensors |= {"bias_up": normal(EXPERTS, 48, seed=6), "bias_down": normal(EXPERTS, 16, seed=7)}
    found = outcome(with_biases, tensors, chosen, dtype)
    expected = outcome(definition_with_biases, tensors, chosen, torch.float64)
    assert len(found) == 7
    for ours, naive in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.detach().double() - naive.detach()).abs().max()
        assert error < tolerance * naive.detach().abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_does_not_see_the_others(dtype):
    tensors, chosen = problem()
    hidden, weights, *matrices = (tensors[name].to(dtype) for name in ("hidden", "weights", "gate_up", "down"))
    together = experts_mlp(hidden, chosen, weights, *matrices)
    for part in (slice(0, 1), slice(5, 20), slice(36, 37)):
        alone = experts_mlp(hidden[part], chosen[part], weights[part], *matrices)
        torch.testing.assert_close(alone, together[part], atol=20 * torch.finfo(dtype).eps, rtol=0)
    assert experts_mlp(hidden[:0], chosen[:0], weights[:0], *matrices).shape == (0, 16)


def test_autocast_multiplies_in_its_type():
    """Which transformers' own products do not, of weights in float32."""
    tensors, chosen = problem()
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = experts_mlp(chosen=chosen, **exact)
    assert found.dtype == torch.float32
    error = (found - definition(chosen=chosen, **exact)).norm() / found.norm()
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_graph_without_breaks(dtype):
    tensors, chosen = problem()
    arguments = {"chosen": chosen, **{name: tensor.to(dtype) for name, tensor in tensors.items()}}
    compiled = torch.compile(experts_mlp, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments), experts_mlp(**arguments))


def test_without_values_experts_have_equally_many():
    tensors, _ = problem()
    nothing = torch.zeros(37, CHOSEN, dtype=torch.long)
    with without_values():
        found = outcome(experts_mlp, tensors, nothing, torch.float64)
    assert found[3].abs().amax((1, 2)).all()
