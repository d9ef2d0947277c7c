"""Divergence from a teacher through two linear heads."""

import pytest
import torch
from torch.nn import functional as F

from kvtrain.kernels.distillation import TeacherHead, linear_kl_sum


def problem(dtype=torch.float64, tokens=37, dim=6, teacher_dim=4, vocab=23):
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    teacher = TeacherHead(torch.randn(tokens, teacher_dim, dtype=dtype), torch.randn(vocab, teacher_dim, dtype=dtype))
    return hidden, weight, teacher, torch.rand(tokens) > 0.3


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_against_the_dense_divergence_with_gradients(chunk_size):
    hidden, weight, teacher, counted = problem()
    ours = linear_kl_sum(hidden, weight, teacher, counted, chunk_size=chunk_size)
    student = F.log_softmax(hidden @ weight.T, -1)
    wanted = F.log_softmax(teacher.hidden @ teacher.weight.T, -1)
    expected = F.kl_div(student[counted], wanted[counted], reduction="sum", log_target=True)
    torch.testing.assert_close(ours, expected)
    for got, right in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(got, right)


def test_a_model_is_its_own_best_student():
    hidden, weight, _, counted = problem()
    loss = linear_kl_sum(hidden, weight, TeacherHead(hidden.detach(), weight.detach()), counted)
    assert abs(loss.item()) < 1e-12
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (hidden, weight))) < 1e-12


def test_the_teacher_gets_no_gradient():
    hidden, weight, teacher, counted = problem()
    leaves = [tensor.requires_grad_() for tensor in teacher]
    linear_kl_sum(hidden, weight, teacher, counted).backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_bfloat16_autocast_is_close():
    hidden, weight, teacher, counted = problem(torch.float32)
    exact = linear_kl_sum(hidden, weight, teacher, counted)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_kl_sum(hidden, weight, teacher, counted)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.1)


def test_other_tokens_or_vocabularies_are_refused():
    hidden, weight, teacher, counted = problem()
    with pytest.raises(ValueError, match="same vocabulary"):
        linear_kl_sum(hidden, weight[:-1], teacher, counted)
    with pytest.raises(ValueError, match="same tokens"):
        linear_kl_sum(hidden[:-1], weight, teacher, counted[:-1])
