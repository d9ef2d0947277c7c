"""Decisions."""

import torch

from kvtrain.models.gating import decide

NEVER = torch.zeros(1, 1, 5, dtype=torch.bool)


def test_limits_and_the_threshold():
    """No noise and no temperature in evaluation; the threshold is 0."""
    logits = torch.tensor([[[-1e6, -1e-3, 0.0, 1e-3, 1e6]]])
    hard = decide(logits, never=NEVER)
    assert hard.values.tolist() == [[[0, 0, 0, 1, 1]]]
    assert hard.keep_bias()[0, 0, :3].tolist() == [0, 0, 0]
    assert hard.keep_bias()[0, 0, 3:].tolist() == [float("-inf")] * 2
    soft = decide(logits, never=NEVER, temperature=0.1)
    assert soft.values[0, 0, 0] == 0 and soft.values[0, 0, 4] == 1 and soft.values[0, 0, 2] == 0.5


def test_bias_is_exact_where_a_naive_logarithm_overflows():
    """Log(1 - sigmoid(z)) as logsigmoid(-z)."""
    logits = torch.tensor([[[60.0, 3.0, -60.0, 0.0, 1.0]]], dtype=torch.float64)
    bias = decide(logits, never=NEVER, temperature=1.0).keep_bias()
    expected = -torch.log1p(torch.exp(logits))
    torch.testing.assert_close(bias, expected, rtol=1e-12, atol=0)


def test_straight_through_is_hard_forward_and_soft_backward():
    logits = torch.tensor([[[-1.0, 0.5, 2.0, -0.1, 0.0]]], dtype=torch.float64, requires_grad=True)
    decisions = decide(logits, never=NEVER, temperature=0.5)
    through = decisions.straight_through()
    assert through.tolist() == [[[0, 1, 1, 0, 0]]]
    (gradient,) = torch.autograd.grad(through.sum(), logits)
    soft = torch.sigmoid(logits / 0.5)
    torch.testing.assert_close(gradient, (soft * (1 - soft) / 0.5).detach())


def test_some_tokens_never_decide():
    logits = torch.full((1, 1, 5), 9.0, requires_grad=True)
    never = torch.tensor([[[True, False, True, False, False]]])
    for temperature in (None, 0.1):
        decisions = decide(logits, never=never, temperature=temperature)
        assert decisions.values[never].tolist() == [0, 0]
        assert decisions.keep_bias()[never].tolist() == [0, 0]
    decisions.keep_bias().sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[never].tolist() == [0, 0]
