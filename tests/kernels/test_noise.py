"""Noise that is a function of its key."""

import math

import torch

from kvtrain.kernels.noise import keyed_logistic, keyed_uniform

ROWS = torch.arange(64)
SHAPE = (4, 1024)


def test_moments():
    """A difference of two Gumbel variables has mean 0 and variance pi^2 / 3."""
    noise = keyed_logistic(ROWS, 3, 7, 2, SHAPE).double()
    count, variance = noise.numel(), math.pi**2 / 3
    assert abs(noise.mean().item()) < 4 * math.sqrt(variance / count)
    assert abs(noise.var().item() / variance - 1) < 0.02


def test_uniform_is_open_and_flat():
    uniform = keyed_uniform(ROWS, 3, 7, 2, SHAPE)
    assert uniform.min() > 0
    assert uniform.max() < 1
    counts = torch.histc(uniform, 64, 0, 1)
    expected = uniform.numel() / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 63 + 5 * math.sqrt(2 * 63)


def test_every_part_of_the_key_counts():
    base = keyed_uniform(ROWS, 3, 7, 2, SHAPE)
    others = [
        keyed_uniform(ROWS, 4, 7, 2, SHAPE),
        keyed_uniform(ROWS, 3, 8, 2, SHAPE),
        keyed_uniform(ROWS, 3, 7, 3, SHAPE),
        keyed_uniform(ROWS + 64, 3, 7, 2, SHAPE),
        base.roll(1, 1),
        base.roll(1, 2),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1].item()) < 0.01


def test_a_row_keeps_its_noise_in_any_batch():
    together = keyed_uniform(ROWS, 1, 2, 3, (2, 50))
    assert torch.equal(keyed_uniform(ROWS[17:18], 1, 2, 3, (2, 50))[0], together[17])
