"""RMSNorm, rotary embedding, SwiGLU and the backend rule: values, dtypes, gradients."""

import logging
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvtrain.kernels.dispatch import at_least_float32, autocast_off, choose_backend, wide_matmul
from kvtrain.kernels.mlp import geglu, swiglu
from kvtrain.kernels.norm import rms_norm
from kvtrain.kernels.rope import apply_rotary, rotary_angles
from tests.backends import forget_backends

HALVES = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_formula(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + epsilon).sqrt()


def swiglu_formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate / (1 + (-gate).exp()) * up


def geglu_formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2 * up


def rotary_formula(heads: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Channels d and d + D / 2 are a complex number turned by position times frequency."""
    first, second = heads.chunk(2, -1)
    angles = positions[:, None, :, None] * frequencies
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def test_rms_norm_in_fp64():
    hidden, weight = normal(3, 5, 8) * 4, normal(8, seed=1)
    for epsilon in (1e-6, 0.5):
        found = rms_norm(hidden, weight, epsilon)
        assert found.dtype == torch.float64
        assert (found - norm_formula(hidden, weight, epsilon)).abs().max() < 1e-12


def test_swiglu_in_fp64():
    gate, up = normal(3, 5, 8) * 4, normal(3, 5, 8, seed=1)
    found = swiglu(gate, up)
    assert found.dtype == torch.float64
    assert (found - swiglu_formula(gate, up)).abs().max() < 1e-12


def test_geglu_in_fp64():
    gate, up = normal(3, 5, 8) * 4, normal(3, 5, 8, seed=1)
    for found in (geglu(gate, up), geglu(gate.clone().requires_grad_(), up)):
        assert found.dtype == torch.float64
        assert (found - geglu_formula(gate, up)).abs().max() < 1e-12


def test_rotary_in_fp64():
    """Far positions too, where single precision is off by 1e-3."""
    heads, frequencies = normal(2, 3, 5, 8), 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 100, 9999, 100003, 1000001]])
    cos, sin = rotary_angles(frequencies, positions, torch.float64)
    assert cos.dtype == sin.dtype == torch.float64
    found = apply_rotary(heads, cos, sin)
    assert found.dtype == torch.float64
    assert (found - rotary_formula(heads, positions, frequencies)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_computed_wide_and_rounded_once(dtype: torch.dtype):
    hidden, weight, gate, up = (normal(4, 64, seed=seed, dtype=dtype) for seed in range(4))
    weight = weight[0]
    for found, expected in (
        (rms_norm(hidden, weight, 1e-6), norm_formula(hidden.double(), weight.double(), 1e-6)),
        (swiglu(gate, up), swiglu_formula(gate.double(), up.double())),
        (geglu(gate, up), geglu_formula(gate.double(), up.double())),
    ):
        assert found.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        assert ((found.double() - expected) / expected).abs().max() < 1.01 * rounding + 1e-6


@pytest.mark.parametrize("dtype", HALVES)
def test_half_rotary_has_wide_angles(dtype: torch.dtype):
    """Angles in half precision would be off by whole turns at position 30,000."""
    heads, frequencies = normal(1, 2, 3, 8, dtype=dtype), torch.tensor([1.0, 0.1, 0.01, 0.001])
    positions = torch.tensor([[0, 1001, 30001]])
    cos, sin = rotary_angles(frequencies, positions, dtype)
    assert cos.dtype == sin.dtype == torch.float32
    found = apply_rotary(heads, cos, sin)
    assert found.dtype == dtype
    expected = rotary_formula(heads.double(), positions, frequencies.double())
    assert (found.double() - expected).abs().max() < 0.02


def test_rms_norm_survives_half_overflow():
    """A square of 1000 overflows float16."""
    hidden = torch.full((1, 4), 1000.0, dtype=torch.float16)
    assert rms_norm(hidden, torch.ones(4, dtype=torch.float16), 1e-6).tolist() == [[1.0] * 4]


def test_a_wide_weight_does_not_widen_the_result():
    assert rms_norm(normal(2, 4, dtype=torch.bfloat16), normal(4, dtype=torch.float32), 1e-6).dtype == torch.bfloat16


def test_rotary_is_that_of_transformers():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    theirs = LlamaRotaryEmbedding(config)
    query, key = normal(2, 4, 9, 8, dtype=torch.float32), normal(2, 2, 9, 8, seed=1, dtype=torch.float32)
    positions = torch.arange(9).repeat(2, 1) + torch.tensor([[0], [20]])
    expected = apply_rotary_pos_emb(query, key, *theirs(query, positions))
    cos, sin = rotary_angles(theirs.inv_freq, positions, torch.float32)
    for ours, wanted in zip((apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6)
    assert not torch.allclose(expected[0], query)


def test_scores_depend_on_distance_alone():
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned = [
            apply_rotary(heads, *rotary_angles(frequencies, torch.tensor([[at]]), torch.float64))
            for heads, at in ((query, query_at), (key, key_at))
        ]
        return (turned[0] * turned[1]).sum()

    assert score(12, 5).item() == pytest.approx(score(107, 100).item(), abs=1e-10)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3


@pytest.mark.parametrize("numbers", [1, 8, 2**17])
@pytest.mark.parametrize("operation", ["norm", "swiglu", "geglu", "broadcast swiglu", "rotary"])
def test_gradients(monkeypatch: pytest.MonkeyPatch, operation: str, numbers: int):
    """Whatever the size of a slice, in tensors that are not contiguous, too."""
    monkeypatch.setattr("kvtrain.kernels.cpu_tiling._NUMBERS", numbers)
    cos, sin = rotary_angles(torch.tensor([1.0, 0.1]), torch.tensor([[3, 4]]), torch.float64)
    calls: dict[str, tuple[Any, ...]] = {
        "norm": (lambda x, w: rms_norm(x.mT, w, 1e-5), normal(3, 5), normal(3, seed=1)),
        "swiglu": (lambda x, y: swiglu(x.mT, y), normal(3, 5), normal(5, 3, seed=1)),
        "geglu": (lambda x, y: geglu(x.mT, y), normal(3, 5), normal(5, 3, seed=1)),
        "broadcast swiglu": (swiglu, normal(5, 1), normal(3, seed=1)),
        "rotary": (lambda x: apply_rotary(x.transpose(1, 2), cos, sin), normal(2, 2, 3, 4)),
    }
    function, *inputs = calls[operation]
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_learnt_angles_have_gradients():
    heads = normal(1, 2, 2, 4)
    angles = [angle.requires_grad_() for angle in (normal(1, 2, 4, seed=1), normal(1, 2, 4, seed=2))]
    assert torch.autograd.gradcheck(apply_rotary, (heads.requires_grad_(), *angles))


def test_what_is_saved_for_the_backward_pass_is_not_wide():
    """Half tensors in: a gate keeps its two inputs, the norm its input and weight, the rotation its angles."""
    half = [normal(2, 3, 8, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in range(2)]
    weight = normal(8, dtype=torch.float32).requires_grad_()
    cos, sin = rotary_angles(torch.rand(4), torch.arange(3)[None], torch.float32)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.shape)) or t, lambda t: t):
        swiglu(*half)
        geglu(*half)
        rms_norm(half[0], weight, 1e-6)
        apply_rotary(half[0][None], cos, sin)
    assert sorted(saved, key=str) == sorted(
        [(torch.bfloat16, (2, 3, 8))] * 5 + [(torch.float32, (8,))] + [(torch.float32, (1, 3, 8))] * 2, key=str
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_promotion(dtype: torch.dtype, expected: torch.dtype):
    tensor = normal(1, 2, 3, 3, dtype=dtype)
    assert at_least_float32(tensor).dtype == expected
    assert wide_matmul(tensor, tensor).dtype == expected
    torch.testing.assert_close(wide_matmul(tensor, tensor).double(), tensor.double() @ tensor.double())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_kept_out(device: str):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tensor = torch.ones(2, 2, device=device)
        with autocast_off(tensor):
            assert (tensor @ tensor).dtype == torch.float32


def test_the_backend_rule(caplog: pytest.LogCaptureFixture):
    """``auto`` takes the first; an explicit name is taken or refused, never replaced; each is logged once."""
    forget_backends()
    with caplog.at_level(logging.INFO, logger="kvtrain"):
        assert [choose_backend("washing", "auto", ("fast", "slow")) for _ in range(3)] == ["fast"] * 3
        assert choose_backend("washing", "slow", ("fast", "slow")) == "slow"
    assert [record.message for record in caplog.records] == [
        "washing runs on the fast backend",
        "washing runs on the slow backend",
    ]
    with pytest.raises(ValueError, match=r"washing: backend 'turbo' .* use 'auto' or one of fast, slow"):
        choose_backend("washing", "turbo", ("fast", "slow"))


def test_backends_can_be_avoided(monkeypatch):
    monkeypatch.setenv("KVTRAIN_AVOID", "fast,flex")
    forget_backends()
    assert choose_backend("washing", "auto", ("fast", "slow")) == "slow"
    assert choose_backend("washing", "fast", ("fast", "slow")) == "fast"
    assert choose_backend("washing", "auto", ("fast",)) == "fast"
