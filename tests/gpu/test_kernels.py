"""Every kernel on every device against its definition in float64, forward and backward."""

import ast
from pathlib import Path

import pytest
import torch

from kvtrain.kernels.cross_entropy import linear_token_losses
from kvtrain.kernels.noise import keyed_logistic, keyed_uniform
from tests.kernels import test_cross_entropy as cross_entropy

from .kernel_calls import kernel_calls

CALLS = kernel_calls()
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)

# Kernels that no test of this folder names, and the one through which each runs.
BEHIND = {
    "attention_chunked": "attention",
    "attention_cpu": "attention",
    "attention_flash": "attention",
    "attention_flex": "attention",
    "attention_mask": "attention",
    "cpu_tiling": "norm",
    "flash_cpu": "attention",
    "head": "cross_entropy",
    "liger": "norm",
    "linear_attention_chunked": "linear_attention",
    "linear_attention_fla": "linear_attention",
    "linear_attention_triton": "linear_attention",
    "linear_loss": "cross_entropy",
    "memo": "documents",
    "page_codec": "paged_attention",
    "page_layout": "paged_attention",
    "page_runs": "paged_attention",
}
# What ranks say to each other: tests/distributed/test_context_parallel.py.
BETWEEN_RANKS = {"context_parallel", "ulysses"}


def test_every_kernel_has_a_test_here(root: Path):
    kernels = {path.stem for path in (root / "kvtrain" / "kernels").glob("*.py")} - {"__init__"}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (root / "tests" / "gpu").glob("*.py")]
    imports = [node.module or "" for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named = {module.rpartition(".")[2] for module in imports if module.startswith("kvtrain.kernels.")}
    assert kernels - named == set(BEHIND) | BETWEEN_RANKS
    assert set(BEHIND.values()) <= named


@DTYPES
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_its_definition(name: str, dtype: torch.dtype, device: str):
    found, exact = CALLS[name].found(device, dtype), CALLS[name].exact(dtype)
    assert found.keys() == exact.keys()
    for part, tensor in exact.items():
        seen = tensor.isfinite()
        assert torch.equal(found[part].isfinite(), seen), part
        error = (found[part].double() - tensor)[seen].norm() / tensor[seen].norm()
        assert error < TOLERANCES[dtype], (part, error.item())


def test_wide_products_are_not_rounded(device: str):
    """Of half types, to what float32 holds."""
    for dtype in (torch.bfloat16, torch.float16):
        call = CALLS["wide product"]
        found, exact = call.found(device, dtype)["result 0"], call.exact(dtype)["result 0"]
        assert found.dtype == torch.float32
        assert (found.double() - exact).norm() < 2e-6 * exact.norm()


@DTYPES
def test_losses_of_single_tokens(dtype: torch.dtype, device: str):
    hidden, weight, targets = cross_entropy.problem(3, 70, dim=24, vocabulary=301)
    hidden, weight = (factor.detach().to(dtype) for factor in (hidden / 4, weight))
    found = linear_token_losses(hidden.to(device), weight.to(device), targets.to(device), chunk_size=32)
    exact = cross_entropy.plain(hidden.double(), weight.double(), targets, "none")
    assert found.dtype == torch.float32 and found[targets.to(device) < 0].eq(0).all()
    assert (found.cpu().double() - exact).norm() < TOLERANCES[dtype] * exact.norm()


def test_noise_is_the_same_on_every_device(device: str):
    """Uniform numbers to the last bit; their logit is the device's own."""
    rows, key = torch.tensor([0, 5, 2**40]), (3, 70, 2, (4, 129))
    assert torch.equal(keyed_uniform(rows.to(device), *key).cpu(), keyed_uniform(rows, *key))
    torch.testing.assert_close(keyed_logistic(rows.to(device), *key).cpu(), keyed_logistic(rows, *key))
