"""Divergence from a teacher through two linear heads, by itself and beside cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.kernels.distillation import TeacherHead, linear_kl_sum, linear_mixed_sum

from .tensor_sizes import TensorSizes

SETTINGS = pytest.mark.parametrize(
    ("direction", "temperature"), [("forward", 1.0), ("reverse", 1.0), ("forward", 2.5), ("reverse", 0.4)]
)


def problem(dtype=torch.float64, tokens=37, dim=6, teacher_dim=4, vocab=23):
    """Hidden states, head, teacher and targets, some of which are ignored."""
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    teacher = TeacherHead(torch.randn(tokens, teacher_dim, dtype=dtype), torch.randn(vocab, teacher_dim, dtype=dtype))
    targets = torch.randint(vocab, (tokens,)).masked_fill(torch.rand(tokens) < 0.3, IGNORE_INDEX)
    return hidden, weight, teacher, targets


def dense_kl(hidden, weight, teacher, counted, direction, temperature):
    """The definition, with all logits at once."""
    student = torch.softmax(hidden @ weight.T / temperature, -1)[counted]
    wanted = torch.softmax(teacher.hidden @ teacher.head.T / temperature, -1)[counted]
    true, model = (wanted, student) if direction == "forward" else (student, wanted)
    return temperature**2 * (true * (true / model).log()).sum()


def assert_equal_with_gradients(ours, expected, factors):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    found, right = (torch.autograd.grad(3 * loss, factors, retain_graph=True) for loss in (ours, expected))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


@SETTINGS
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_against_the_dense_divergence_with_gradients(direction, temperature, chunk_size):
    hidden, weight, teacher, targets = problem()
    settings = {"direction": direction, "temperature": temperature}
    counted = targets != IGNORE_INDEX
    ours = linear_kl_sum(hidden, weight, teacher, counted, chunk_size=chunk_size, **settings)
    assert_equal_with_gradients(ours, dense_kl(hidden, weight, teacher, counted, **settings), (hidden, weight))


@SETTINGS
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_a_mixture_against_the_dense_losses_with_gradients(direction, temperature, chunk_size):
    """Cross-entropy stays at temperature 1; both parts come out unweighed."""
    hidden, weight, teacher, targets = problem()
    settings = {"direction": direction, "temperature": temperature}
    mixed = linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.7, chunk_size=chunk_size, **settings)
    divergence = dense_kl(hidden, weight, teacher, targets != IGNORE_INDEX, **settings)
    cross_entropy = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert_equal_with_gradients(mixed.total, 0.7 * divergence + 0.3 * cross_entropy, (hidden, weight))
    torch.testing.assert_close(mixed.divergence, divergence.detach())
    torch.testing.assert_close(mixed.cross_entropy, cross_entropy.detach())
    assert not mixed.divergence.requires_grad and not mixed.cross_entropy.requires_grad


@SETTINGS
def test_gradients_are_finite_differences(direction, temperature):
    hidden, weight, teacher, targets = problem(tokens=7, vocab=5)
    settings = {"direction": direction, "temperature": temperature, "chunk_size": 3}
    counted = targets != IGNORE_INDEX
    assert 0 < counted.sum() < 7
    assert torch.autograd.gradcheck(lambda h, w: linear_kl_sum(h, w, teacher, counted, **settings), (hidden, weight))

    def mixture(h, w):
        return linear_mixed_sum(h, w, teacher, targets, divergence_weight=0.4, **settings).total

    assert torch.autograd.gradcheck(mixture, (hidden, weight))


@SETTINGS
def test_a_model_is_its_own_best_student(direction, temperature):
    hidden, weight, _, targets = problem()
    own = TeacherHead(hidden.detach(), weight.detach())
    counted = targets != IGNORE_INDEX
    loss = linear_kl_sum(hidden, weight, own, counted, direction=direction, temperature=temperature)
    assert abs(loss.item()) < 1e-12
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (hidden, weight))) < 1e-12


@SETTINGS
def test_ignored_tokens_change_nothing(direction, temperature):
    hidden, weight, teacher, targets = problem()
    counted = targets != IGNORE_INDEX
    other = TeacherHead(torch.where(counted[:, None], teacher.hidden, 100.0), teacher.head)
    changed = torch.where(counted[:, None], hidden, -50.0).detach().requires_grad_()
    settings = {"divergence_weight": 0.7, "direction": direction, "temperature": temperature}
    ours = linear_mixed_sum(hidden, weight, teacher, targets, **settings)
    theirs = linear_mixed_sum(changed, weight, other, targets, **settings)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(s.total, (h, weight)) for s, h in ((ours, hidden), (theirs, changed))]
    torch.testing.assert_close(*grads)
    assert grads[0][0][~counted].eq(0).all() and grads[0][0][counted].ne(0).all()


def test_the_teacher_gets_no_gradient():
    hidden, weight, teacher, targets = problem()
    leaves = [tensor.requires_grad_() for tensor in teacher]
    linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.5).total.backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert hidden.grad.abs().max() > 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_logits_never_exist_as_a_whole(share):
    hidden, weight, teacher, targets = problem(tokens=64, dim=4, vocab=128)
    with TensorSizes() as sizes:
        if share == 1.0:
            linear_kl_sum(hidden, weight, teacher, targets != IGNORE_INDEX, chunk_size=16).backward()
        else:
            linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=share, chunk_size=16).total.backward()
    assert max(sizes) == 16 * 128


def test_the_students_logits_are_built_once_a_chunk(monkeypatch):
    """Two products a chunk give logits, the student's and the teacher's, whatever is made of them."""
    hidden, weight, teacher, targets = problem(tokens=12, dim=6, teacher_dim=4)
    shapes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append((a.shape, b.shape)) or matmul(a, b))
    with torch.no_grad():
        linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.5, chunk_size=4)
    assert shapes == [((4, 6), (6, 23)), ((4, 4), (4, 23))] * 3


def test_no_tokens_cost_nothing():
    hidden, weight, teacher, targets = problem(tokens=0)
    assert [part.item() for part in linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.5)] == [
        0
    ] * 3


def test_bfloat16_autocast_is_close():
    hidden, weight, teacher, targets = problem(torch.float32)
    exact = linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.5)
    assert {part.dtype for part in rounded} == {torch.float32}
    assert rounded.total.item() != exact.total.item()  # it did multiply in bfloat16
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.1)


def test_other_tokens_or_vocabularies_are_refused():
    hidden, weight, teacher, targets = problem()
    counted = targets != IGNORE_INDEX
    with pytest.raises(ValueError, match="same vocabulary"):
        linear_kl_sum(hidden, weight[:-1], teacher, counted)
    with pytest.raises(ValueError, match="same tokens"):
        linear_mixed_sum(hidden[:-1], weight, teacher, targets[:-1], divergence_weight=0.5)
