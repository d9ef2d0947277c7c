"""Liger's kernels, run by Triton's interpreter in a process of its own, and the rule that chooses them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtrain.kernels import liger
from kvtrain.kernels.cross_entropy import linear_cross_entropy_sum
from kvtrain.kernels.mlp import swiglu
from kvtrain.kernels.norm import rms_norm
from kvtrain.kernels.rope import apply_rotary, rotary_angles

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]

# Relative to float64. One rounding of a half type is at most half of its epsilon, and next to nothing averages out.
TOLERANCES = {"torch.float32": 1e-6, "torch.bfloat16": 6e-3, "torch.float16": 8e-4, "autocast": 1e-2}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What ``liger_interpreted.py`` prints."""
    if MISSING:
        pytest.skip(f"needs {' and '.join(MISSING)}")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.liger_interpreted"]
    result = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_are_their_definitions(report: dict[str, Any], dtype: str):
    """Output and gradients; that process also asserts that nothing is overwritten and that backward may run twice."""
    expected = {"torch.bfloat16": 9, "autocast": 1}.get(dtype, 11)
    assert len(report[dtype]) == expected
    wrong = {name: errors for name, errors in report[dtype].items() if not max(errors) < TOLERANCES[dtype]}
    assert wrong == {}


def test_gradients_of_gradients_are_refused(report: dict[str, Any]):
    for name in ("norm", "gate", "rotary", "loss"):
        assert "once_differentiable" in report["refusals"][name]


def test_targets_out_of_range_are_refused(report: dict[str, Any]):
    assert report["refusals"]["target 4"] == "targets must be -100 or from 0 to 3; found 4"
    assert report["refusals"]["target -1"] == "targets must be -100 or from 0 to 3; found -1"


def calls() -> dict[str, Any]:
    angles = rotary_angles(torch.tensor([1.0, 0.1]), torch.arange(3)[None], torch.float32)
    return {
        "norm": lambda **o: rms_norm(torch.ones(2, 3), torch.ones(3), 1e-5, **o),
        "gate": lambda **o: swiglu(torch.ones(2, 3), torch.ones(2, 3), **o),
        "rotary embedding": lambda **o: apply_rotary(torch.ones(1, 2, 3, 4), *angles, halves_repeat=True, **o),
        "cross-entropy": lambda **o: linear_cross_entropy_sum(
            torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4]), **o
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_what_cannot_run_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, name: str):
    """On the CPU there is torch alone, whether Liger is installed or not."""
    call = calls()[name]
    monkeypatch.setattr(liger, "_is_installed", lambda: False)
    with pytest.raises(ValueError, match=rf"{name}: backend 'liger' needs liger-kernel.*'kvtrain\[liger\]'"):
        call(backend="liger")
    monkeypatch.setattr(liger, "_is_installed", lambda: True)
    with pytest.raises(ValueError, match=f"{name}: backend 'liger' cannot run this call; use 'auto' or one of torch"):
        call(backend="liger")
    assert torch.equal(call(), call(backend="torch"))


def test_auto_takes_liger_wherever_it_can_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liger, "_is_installed", lambda: True)
    monkeypatch.setattr(liger, "on_gpu", lambda tensor: True)
    good = torch.ones(2, 3)

    def chosen(*tensors: torch.Tensor, requested: str = "auto", fits: bool = True) -> bool:
        return liger.takes_liger("washing", requested, *tensors, fits=fits)

    assert chosen(good) and chosen(good, good.bfloat16(), good.half()) and chosen(good, requested="liger")
    assert not chosen(good, requested="torch")
    assert not chosen(good, fits=False)
    assert not chosen(good, good.double())
    assert not chosen(good, good[:0])
    assert not chosen(good, torch.ones(1, 65537))
    monkeypatch.setattr(liger, "on_gpu", lambda tensor: tensor is good)
    assert not chosen(good, good.clone())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda **o: swiglu(torch.ones(2, 3), torch.ones(1, 3), **o),
        lambda **o: swiglu(torch.ones(2, 3), torch.ones(2, 3).half(), **o),
        lambda **o: apply_rotary(torch.ones(1, 2, 3, 4), *[torch.ones(1, 3, 4)] * 2, **o),
        lambda **o: apply_rotary(torch.ones(1, 2, 3, 4), *[torch.ones(1, 3, 4).half()] * 2, halves_repeat=True, **o),
        lambda **o: apply_rotary(
            torch.ones(1, 2, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4).requires_grad_(), halves_repeat=True, **o
        ),
    ],
    ids=["broadcast", "two dtypes", "any angles", "half angles", "learned angles"],
)
def test_what_the_kernels_do_not_know_runs_on_torch(monkeypatch: pytest.MonkeyPatch, wrong: Any):
    monkeypatch.setattr(liger, "_is_installed", lambda: True)
    monkeypatch.setattr(liger, "on_gpu", lambda tensor: True)
    with pytest.raises(ValueError, match="backend 'liger' cannot run this call"):
        wrong(backend="liger")
    assert wrong().shape == wrong(backend="torch").shape
