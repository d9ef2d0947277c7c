"""Which heads are read as a matrix, and the losses of those that are not, against all logits at once."""

import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor

from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum, linear_token_losses
from kvtrain.kernels.distillation import TeacherHead, linear_kl_sum, linear_mixed_sum
from kvtrain.kernels.head import weight_of

from .tensor_sizes import TensorSizes

TOKENS, DIM, VOCAB = 13, 6, 17


class LowRank(nn.Module):
    """A linear layer with a learnt addition beside it, whose weight looks like that of the layer alone."""

    def __init__(self, base: nn.Linear, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, **options))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, **options))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + hidden @ self.down.T @ self.up.T


def linear(bias: bool = False, dim: int = DIM, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(dim, VOCAB, bias=bias, dtype=torch.float64)


def changed(head: nn.Linear, change: str) -> nn.Module:
    """A head that is no longer a matrix alone."""
    if change.endswith("hook"):
        getattr(head, f"register_{change}")(lambda *_: None)
    elif change == "forward of the instance":
        head.forward = functools.partial(nn.Linear.forward, head)
    elif change == "parametrised":
        parametrizations.weight_norm(head)
    elif change == "tensors within the weight":
        head.weight = nn.Parameter(TwoTensor(head.weight.detach(), head.weight.detach().clone()))
    else:
        others = {"bias": linear(bias=True), "adapter": LowRank(head), "subclass": type("Mine", (nn.Linear,), {})(2, 3)}
        return others[change]
    return head


@pytest.mark.parametrize(
    "change",
    [
        *(f"{kind}_hook" for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")),
        "forward of the instance",
        "parametrised",
        "tensors within the weight",
        "bias",
        "adapter",
        "subclass",
    ],
)
def test_what_is_more_than_a_matrix_is_asked(change):
    assert weight_of(changed(linear(), change)) is None


def test_a_matrix_is_read():
    head = linear()
    assert weight_of(head) is head.weight and weight_of(head.weight) is head.weight

    def gather(*_):
        """As ZeRO-3 hooks every module."""

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    head.register_forward_pre_hook(gather)
    assert weight_of(head) is head.weight
    with FakeTensorMode():  # of which estimates are made
        head = linear()
        assert weight_of(head) is head.weight


HEADS = {
    "low rank": lambda: LowRank(linear()),
    "bias": lambda: linear(bias=True),
    "parametrised": lambda: changed(linear(), "parametrised"),
    "observed": lambda: changed(linear(), "forward_hook"),
}


def problem(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    return hidden, targets.masked_fill(torch.rand(tokens, generator=generator) < 0.3, IGNORE_INDEX)


def teachers() -> tuple[TeacherHead, Tensor]:
    """One whose head is a module, and its logits."""
    generator = torch.Generator().manual_seed(9)
    hidden, head = torch.randn(TOKENS, 3, generator=generator, dtype=torch.float64), LowRank(linear(dim=3, seed=1), 2)
    return TeacherHead(hidden, head), head(hidden).detach()


def dense_kl(logits: Tensor, wanted: Tensor, counted: Tensor, direction: str) -> Tensor:
    pair = [torch.log_softmax(each, -1)[counted] for each in (wanted, logits)]
    true, model = pair if direction == "forward" else pair[::-1]
    return (true.exp() * (true - model)).sum()


def assert_same(ours: Tensor, expected: Tensor, hidden: Tensor, head: nn.Module) -> None:
    """And so are the gradients of all that learns, none of them 0."""
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    leaves = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    found, right = (torch.autograd.grad(3 * loss, leaves) for loss in (ours, expected))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert all(grad.abs().max() > 0 for grad in found)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_the_loss_is_that_of_its_own_logits(name, chunk_size):
    (hidden, targets), head = problem(), HEADS[name]()
    ours = linear_cross_entropy_sum(hidden, head, targets, chunk_size=chunk_size)
    tokens = functional.cross_entropy(head(hidden), targets, ignore_index=IGNORE_INDEX, reduction="none")
    assert_same(ours, tokens.sum(), hidden, head)
    found = linear_token_losses(hidden, head, targets, chunk_size=chunk_size)
    torch.testing.assert_close(found, tokens.detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not linear_cross_entropy_sum(hidden, head, targets).requires_grad


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("student", ["low rank", "matrix"])
def test_so_is_the_divergence_from_a_teacher(direction, student):
    (hidden, targets), head = problem(), HEADS[student]() if student in HEADS else linear()
    teacher, wanted = teachers()
    logits, counted = head(hidden), targets != IGNORE_INDEX
    expected = dense_kl(logits, wanted, counted, direction)
    ours = linear_kl_sum(hidden, head, teacher, counted, direction=direction, chunk_size=4)
    mixed = linear_mixed_sum(hidden, head, teacher, targets, divergence_weight=0.7, direction=direction, chunk_size=4)
    cross_entropy = functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(mixed.divergence, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed.cross_entropy, cross_entropy.detach(), rtol=1e-12, atol=1e-12)
    assert not mixed.divergence.requires_grad and not mixed.cross_entropy.requires_grad
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert_same(mixed.total, 0.7 * expected + 0.3 * cross_entropy, hidden, head)
    assert all(parameter.grad is None for parameter in teacher.head.parameters())


def test_other_vocabularies_are_refused():
    (hidden, targets), (teacher, _) = problem(), teachers()
    with pytest.raises(ValueError, match="same vocabulary, not 16 and 17 tokens"):
        linear_kl_sum(hidden, linear().weight[:-1], teacher, targets != IGNORE_INDEX)


def test_logits_never_exist_as_a_whole():
    head, (hidden, targets) = LowRank(linear()), problem(tokens=64)
    with TensorSizes() as sizes:
        linear_cross_entropy_sum(hidden, head, targets, chunk_size=16).backward()
    assert 16 * VOCAB in sizes and max(sizes) == hidden.numel() < 64 * VOCAB


def test_a_loss_that_is_dropped_leaves_nothing():
    """A graph that refers to what refers to it would stay for good."""
    (hidden, targets), (teacher, _), head = problem(), teachers(), LowRank(linear())
    held = weakref.ref(teacher.head)
    loss = linear_mixed_sum(hidden, head, teacher, targets, divergence_weight=0.5, chunk_size=4).total
    del loss, teacher
    gc.collect()
    assert held() is None


def test_no_tokens_cost_nothing():
    hidden, targets = problem(tokens=0)
    loss = linear_cross_entropy_sum(hidden, LowRank(linear()), targets)
    loss.backward()
    assert loss.item() == 0


def test_liger_knows_matrices_alone():
    hidden, targets = problem()
    with pytest.raises(ValueError, match=r"backend 'liger' (cannot run this call|needs liger-kernel)"):
        linear_cross_entropy_sum(hidden, LowRank(linear()), targets, backend="liger")
