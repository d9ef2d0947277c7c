"""Windowed segment means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.kernels import pooling
from kvtrain.kernels.pooling import pool_segments, pool_segments_reference


def pool_line(values, merge, window=12):
    """Pool a single head of scalars with importance 1."""
    shape = (1, 1, len(values))
    inputs = torch.tensor(values, dtype=torch.float64).view(*shape, 1)
    merge = torch.tensor(merge, dtype=torch.float64).view(shape)
    return pool_segments(inputs, merge, torch.ones(shape, dtype=torch.float64), window).flatten()


def test_golden_values():
    """Spec 1.3."""
    expected = torch.tensor([1, 1.5, 3, 3.5], dtype=torch.float64)
    torch.testing.assert_close(pool_line([1, 2, 3, 4], [0.3, 1, 0, 1]), expected)
    expected = torch.tensor([1, 5 / 3, 17 / 7, 49 / 15], dtype=torch.float64)
    torch.testing.assert_close(pool_line([1, 2, 3, 4], [0.5] * 4), expected)


def test_unbounded_window_is_the_recurrence():
    torch.manual_seed(0)
    inputs, merge = torch.randn(2, 3, 40, 5, dtype=torch.float64), torch.rand(2, 3, 40, dtype=torch.float64)
    importance = torch.rand(2, 3, 40, dtype=torch.float64) + 0.1
    numerator, denominator, expected = torch.zeros(2, 3, 5), torch.zeros(2, 3), []
    for token in range(40):
        numerator = merge[..., token, None] * numerator + importance[..., token, None] * inputs[:, :, token]
        denominator = merge[..., token] * denominator + importance[..., token]
        expected.append(numerator / denominator[..., None])
    torch.testing.assert_close(pool_segments(inputs, merge, importance, 40), torch.stack(expected, 2))


@settings(max_examples=30)
@given(length=st.integers(1, 150), window=st.integers(1, 20), hard=st.booleans(), seed=st.integers(0, 99))
def test_against_the_loop_with_gradients(length, window, hard, seed):
    torch.manual_seed(seed)
    inputs = torch.randn(1, 2, length, 3, dtype=torch.float64, requires_grad=True)
    merge = torch.rand(1, 2, length, dtype=torch.float64)
    merge = (merge.round() if hard else merge).requires_grad_()
    importance = (torch.rand(1, 2, length, dtype=torch.float64) + 0.05).requires_grad_()
    weights = torch.randn_like(inputs)
    results = []
    for function in (pool_segments, pool_segments_reference):
        pooled = function(inputs, merge, importance, window)
        grads = torch.autograd.grad((pooled * weights).sum(), (inputs, merge, importance), allow_unused=True)
        results.append((pooled, *(torch.zeros(()) if g is None else g for g in grads)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected.expand_as(ours).to(ours), atol=1e-10, rtol=1e-8)


def test_means_stay_in_the_hull_and_forget_scale():
    """T9."""
    torch.manual_seed(1)
    inputs, merge = torch.randn(1, 2, 60, 4), (torch.rand(1, 2, 60) > 0.3).float()
    importance = torch.rand(1, 2, 60) + 0.01
    pooled = pool_segments(inputs, merge, importance, 12)
    torch.testing.assert_close(pool_segments(inputs, merge, importance * 7, 12), pooled)
    start = 0
    for token in range(60):
        start = token if merge[0, 0, token] == 0 or token == 0 else start
        segment = inputs[0, 0, max(start, token - 11) : token + 1]
        assert (pooled[0, 0, token] <= segment.amax(0) + 1e-5).all()
        assert (pooled[0, 0, token] >= segment.amin(0) - 1e-5).all()
    equal = torch.ones(1, 2, 60, 4) * 0.37
    torch.testing.assert_close(pool_segments(equal, merge, importance, 12), equal)


def test_half_types_are_computed_in_float32():
    inputs = torch.randn(1, 1, 30, 2, dtype=torch.bfloat16)
    merge, importance = torch.ones(1, 1, 30), torch.rand(1, 1, 30)
    exact = pool_segments(inputs.float(), merge, importance, 12)
    assert exact.dtype == torch.float32
    assert torch.equal(pool_segments(inputs, merge, importance, 12), exact.bfloat16())


def test_gradients_are_the_derivatives():
    """Of the inputs and of both decision channels, over several blocks of two rows and heads."""
    torch.manual_seed(2)
    inputs = torch.randn(2, 2, 37, 2, dtype=torch.float64, requires_grad=True)
    merge = torch.rand(2, 2, 37, dtype=torch.float64, requires_grad=True)
    importance = (torch.rand(2, 2, 37, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: pool_segments(*tensors, 5), (inputs, merge, importance))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_nothing(dtype):
    inputs = torch.randn(1, 2, 50, 4, dtype=dtype)
    merge, importance = torch.rand(1, 2, 50), torch.rand(1, 2, 50)
    expected = pool_segments(inputs, merge, importance, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool_segments(inputs, merge, importance, 12)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_heads_never_reach_each_other():
    """Not even by a zero times what is not finite."""
    torch.manual_seed(3)
    inputs, merge, importance = torch.randn(2, 2, 40, 3), torch.rand(2, 2, 40), torch.rand(2, 2, 40)
    expected = pool_segments(inputs, merge, importance, 12)
    inputs[0, 1] = float("nan")
    found = pool_segments(inputs, merge, importance, 12)
    assert found[0, 1].isnan().all()
    found[0, 1] = expected[0, 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [1, 5])
def test_no_importance_means_zero_not_nan(window):
    pooled = pool_segments(torch.randn(1, 1, 8, 2), torch.ones(1, 1, 8), torch.zeros(1, 1, 8), window)
    assert torch.equal(pooled, torch.zeros_like(pooled))


def test_chains_that_no_longer_count_are_zero():
    """Not denormal numbers, which are slow; what is left is the mean to the last digit."""
    merge, importance = torch.full((1, 1, 40), 1e-4), torch.rand(1, 1, 40) + 0.1
    inputs = torch.randn(1, 1, 40, 2)
    bands = pooling._BandWeights.apply(merge, importance, 12)
    assert not ((bands != 0) & (bands.abs() < torch.finfo(torch.float32).tiny)).any()
    exact = pool_segments_reference(*(tensor.double() for tensor in (inputs, merge, importance)), 12)
    torch.testing.assert_close(pool_segments(inputs, merge, importance, 12).double(), exact, rtol=1e-6, atol=1e-7)


def test_compiled_with_gradients():
    """As far as the graphs that a compiler would get, in which what is written to may not overlap."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    tensors = [torch.randn(1, 2, 9, 3), torch.rand(1, 2, 9), torch.rand(1, 2, 9) + 0.1]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    results = []
    for function in (pool_segments, torch.compile(pool_segments, backend="aot_eager")):
        pooled = function(*tensors, 4)
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), tensors)))
    torch.testing.assert_close(*results)
