"""The Triton kernel of linear attention, run by Triton's interpreter in a process of its own.

The interpreter must be chosen before the kernel is imported: run as a module, this file prints, as JSON, how far the
kernel is from the definition in float64.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtrain.kernels import linear_attention as kernel
from kvtrain.kernels.linear_attention import linear_attention, linear_attention_reference

ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
HALVES = (torch.bfloat16, torch.float16)

# The kernel takes 32 tokens at a time: less than that, just that, and more with a rest.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"length": 33},
    "decay, state": {"length": 64, "slopes": True, "state": True},
    "documents, padding, decay, state": {
        "batch": 2,
        "length": 50,
        "documents": True,
        "slopes": True,
        "state": True,
        "value_dim": 70,
    },
    "short": {"length": 5, "dim": 20, "state": True},
    "both ways, documents": {"length": 40, "documents": True, "causal": False},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(
    dtype: torch.dtype,
    device: str,
    *,
    length: int,
    batch: int = 1,
    dim: int = 8,
    value_dim: int = 5,
    causal: bool = True,
    slopes: bool = False,
    documents: bool = False,
    state: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, turned so that heads lie innermost but one, and options, ids by columns; padding holds NaN."""
    heads = 2
    tensors = {
        name: normal(batch, length, heads, channels, seed=seed).to(device, dtype).transpose(1, 2)
        for seed, (name, channels) in enumerate({"query": dim, "key": dim, "value": value_dim}.items())
    }
    options: dict[str, Any] = {"causal": causal}
    if documents:
        generator = torch.Generator().manual_seed(4)
        ids = 1 + (torch.rand(batch, length, generator=generator) < 0.08).cumsum(1) % 3
        ids = ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.2, 0).to(device)
        tensors = {
            name: tensor.masked_fill((ids == 0)[:, None, :, None], float("nan")) for name, tensor in tensors.items()
        }
        options["document_ids"] = ids.mT.contiguous().mT
    if slopes:
        options["slopes"] = torch.tensor([0.0, 0.3], device=device)
    if state:
        tensors["state"] = normal(batch, heads, dim, value_dim, seed=5).to(device, torch.float32)
    return tensors, options


def run(attend: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Both results, and gradients of a random linear loss of them."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output, final = attend(**leaves, **options)
    weights = (normal(*part.shape, seed=6 + i).to(part.device) for i, part in enumerate((output, final)))
    loss = sum((part * weight.to(part.dtype)).sum() for part, weight in zip((output, final), weights, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output, "final": final, **{f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def errors(name: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Of every tensor, relative to the definition in float64."""
    return backend_errors("triton", CASES[name], dtype, device)


def backend_errors(backend: str, case: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, float]:
    """``errors`` of a backend that takes these cases."""
    tensors, options = call(dtype, device, **case)
    found = run(linear_attention, tensors, options | {"backend": backend})
    expected = run(linear_attention_reference, {name: tensor.double() for name, tensor in tensors.items()}, options)
    for tensor_name, tensor in found.items():
        wide = tensor_name == "final" or tensor_name == "grad_state"
        assert tensor.dtype == (torch.float32 if wide else dtype), tensor_name
    return {key: float((found[key].double() - tensor).norm() / tensor.norm()) for key, tensor in expected.items()}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_linear_attention_triton"]
    result = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def interpreted() -> list[tuple[str, torch.dtype]]:
    """Every case in float32, and the fullest one in half types: the interpreter is slow."""
    return [
        *((name, torch.float32) for name in CASES),
        *(("documents, padding, decay, state", dtype) for dtype in HALVES),
    ]


@pytest.mark.parametrize(("name", "dtype"), interpreted())
def test_the_kernel_is_the_definition(report: dict[str, Any], name: str, dtype: torch.dtype):
    found = report[f"{name} {dtype}"]
    assert len(found) == (6 if CASES[name].get("state") else 5)
    assert {key: value for key, value in found.items() if not value < TOLERANCES[dtype]} == {}


def test_auto_takes_it_where_it_can_run(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    good = torch.ones(1, 1, 2, 128)
    assert kernel._backends(good, good, good) == ["torch"]
    monkeypatch.setattr(kernel, "_on_gpu", lambda tensor: True)
    assert kernel._backends(good, good.bfloat16(), good.half()) == ["triton", "torch"]
    for bad in (good.double(), torch.ones(1, 1, 2, 129), good[:, :, :0]):
        assert kernel._backends(good, good, bad) == ["torch"]
    monkeypatch.setattr(kernel, "_has_triton", lambda: False)
    assert kernel._backends(good, good, good) == ["torch"]


if __name__ == "__main__":
    kernel._on_gpu = lambda tensor: True
    print(json.dumps({f"{name} {dtype}": errors(name, dtype) for name, dtype in interpreted()}))
