"""The compression hinge."""

import torch

from kvtrain.losses.compression import compressed_fraction, compression_hinge


def test_fraction_counts_what_had_a_choice():
    decisions = [torch.tensor([[[1.0, 1, 0, 1], [0, 0, 0, 1]]]), torch.tensor([[[1.0, 0, 0, 1], [1, 0, 0, 1]]])]
    counted = torch.tensor([[False, True, True, False]])
    assert compressed_fraction(decisions, counted).tolist() == [1 / 8]


def test_hinge_is_zero_from_the_target_on_and_so_is_its_gradient():
    """T2."""
    for share, expected in ((0.5, 0.25), (0.75, 0.0), (0.9, 0.0)):
        fractions = torch.tensor([share], requires_grad=True)
        loss = compression_hinge(fractions, 4.0)
        loss.backward()
        assert abs(loss.item() - expected) < 1e-7
        assert (fractions.grad.item() == 0) == (expected == 0)


def test_hinge_is_per_row():
    """A row above the target does not pay for one below it."""
    loss = compression_hinge(torch.tensor([1.0, 0.5]), 4.0)
    assert abs(loss.item() - 0.125) < 1e-7


def test_a_row_without_choices_is_harmless():
    counted = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.isfinite(compressed_fraction([torch.ones(1, 2, 3)], counted)).all()
