"""The loss of a linear head, summed and token by token, against ``torch.nn.functional.cross_entropy``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum, linear_token_losses

from .tensor_sizes import TensorSizes

PROPERTY = settings(max_examples=60)


def problem(
    seed: int, num_tokens: int = 13, dim: int = 5, vocabulary: int = 11, ignored: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((num_tokens, dim), generator=generator, dtype=torch.float64)
    weight = torch.randn((vocabulary, dim), generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    skip = torch.rand(num_tokens, generator=generator) < ignored
    return hidden.requires_grad_(), weight.requires_grad_(), targets.masked_fill(skip, IGNORE_INDEX)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction=reduction)


@PROPERTY
@given(
    st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 25), st.sampled_from([0.0, 0.4, 1.0]), st.floats(-3, 3)
)
def test_value_and_gradients(seed: int, num_tokens: int, chunk_size: int, ignored: float, factor: float):
    """Any chunk size gives the plain loss; the incoming gradient scales both gradients."""
    hidden, weight, targets = problem(seed, num_tokens, ignored=ignored)
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_size=chunk_size)
    expected = plain(hidden, weight, targets)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss * factor, (hidden, weight))
    wanted = torch.autograd.grad(expected * factor, (hidden, weight))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 25))
def test_token_losses(seed: int, num_tokens: int, chunk_size: int):
    hidden, weight, targets = problem(seed, num_tokens)
    losses = linear_token_losses(hidden, weight, targets, chunk_size=chunk_size)
    torch.testing.assert_close(losses, plain(hidden, weight, targets, "none"), rtol=1e-12, atol=1e-12)
    assert losses[targets == IGNORE_INDEX].eq(0.0).all()
    assert not losses.requires_grad


def test_a_known_loss():
    """Equal logits over V tokens cost log V each; ignored targets cost nothing."""
    loss = linear_cross_entropy_sum(torch.zeros(4, 3), torch.randn(8, 3), torch.tensor([1, 2, IGNORE_INDEX, 7]))
    assert loss.item() == pytest.approx(3 * torch.tensor(8.0).log().item())


def test_ignored_rows_get_no_gradient():
    hidden, weight, targets = problem(0)
    linear_cross_entropy_sum(hidden, weight, targets, chunk_size=4).backward()
    assert hidden.grad is not None
    ignored = targets == IGNORE_INDEX
    assert ignored.any() and hidden.grad[ignored].eq(0.0).all()
    assert hidden.grad[~ignored].abs().sum(-1).gt(0.0).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_frozen_factor(frozen: int):
    """A head that is not trained gets no gradient, and the other's does not change."""
    factors, targets = list(problem(1)[:2]), problem(1)[2]
    factors[frozen] = factors[frozen].detach()
    trained = factors[1 - frozen]
    (found,) = torch.autograd.grad(linear_cross_entropy_sum(*factors, targets), trained)
    (wanted,) = torch.autograd.grad(plain(*factors, targets), trained)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_no_memory_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets = problem(2)
    wanted = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    allocate = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan")))
    found = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, targets, chunk_size=4), (hidden, weight))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_logits_never_exist_as_a_whole(train: bool):
    """The largest tensor is one chunk of logits (the head itself is smaller here), backward included."""
    num_tokens, vocabulary, chunk_size = 64, 128, 16
    hidden, weight, targets = problem(3, num_tokens, 4, vocabulary)
    with TensorSizes() as sizes:
        if train:
            linear_cross_entropy_sum(hidden, weight, targets, chunk_size=chunk_size).backward()
        else:
            linear_token_losses(hidden, weight, targets, chunk_size=chunk_size)
    assert max(sizes) == chunk_size * vocabulary < num_tokens * vocabulary


def test_the_size_spy_sees_whole_logits():
    hidden, weight, targets = problem(3, 64, 4, 128)
    with TensorSizes() as sizes:
        plain(hidden, weight, targets).backward()
    assert max(sizes) == 64 * 128


def test_bf16_autocast_stays_near_fp32():
    """Autocast multiplies in bf16; loss and gradients are fp32 and off by bf16 rounding alone."""
    hidden, weight, targets = (x.detach().float() if x.is_floating_point() else x for x in problem(4, 40, 32, 50))
    hidden.requires_grad_(), weight.requires_grad_()
    wanted = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_size=16)
        token_losses = linear_token_losses(hidden, weight, targets, chunk_size=16)
    exact = plain(hidden, weight, targets)
    assert loss.dtype == token_losses.dtype == torch.float32
    assert loss.item() != exact.item()  # it did multiply in bf16
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert token_losses.sum().item() == pytest.approx(loss.item(), rel=1e-5)
    for found, expected in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() / expected.norm() < 0.01


def test_a_bf16_head_accumulates_wide():
    """Many chunks add up in fp32: the error of the head's gradient does not grow with their number."""
    hidden, weight, targets = (
        x.detach().bfloat16() if x.is_floating_point() else x for x in problem(5, 512, 8, 6, 0.0)
    )
    weight.requires_grad_()
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_size=4)
    assert loss.dtype == torch.float32
    (found,) = torch.autograd.grad(loss, weight)
    wide = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(hidden.double(), wide, targets), wide)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() / wanted.norm() < 0.01


def test_no_tokens_cost_nothing():
    hidden, weight, targets = problem(6, 0)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0 and grads[1].eq(0.0).all() and grads[0].shape == (0, 5)
    assert linear_token_losses(hidden, weight, targets).shape == (0,)


@pytest.mark.parametrize("function", [linear_cross_entropy_sum, linear_token_losses])
def test_rows_without_a_target_are_refused(function):
    hidden, weight, targets = problem(7)
    with pytest.raises(ValueError, match=r"hidden \(13, 5\) and targets \(12,\) must be"):
        function(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(N,\)"):
        function(hidden.unsqueeze(0), weight, targets.unsqueeze(0))
