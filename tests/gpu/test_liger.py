"""Liger on a GPU: what the interpreter checks on the CPU, and the shapes that it is too slow for."""

import logging

import pytest
import torch

from tests.backends import forget_backends
from tests.kernels.liger_cases import autocast_errors, error, errors, norm, normal, refusals

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _liger() -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kernels_are_their_definitions(dtype: torch.dtype):
    found = errors(dtype, "cuda")
    assert len(found) == 11
    assert {name: values for name, values in found.items() if not max(values) < TOLERANCES[dtype]} == {}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(40_001, 128), (1_025, 4_096)], ids=str)
def test_norms_of_many_rows_and_of_wide_ones(dtype: torch.dtype, shape: tuple[int, int]):
    """Narrow rows by the thousand go to another kernel."""
    hidden = normal(*shape, seed=0, dtype=dtype, device="cuda")
    weight = normal(shape[1], seed=1, dtype=dtype, device="cuda")
    assert max(error(norm, [hidden, weight])) < TOLERANCES[dtype]


def test_autocast():
    assert max(autocast_errors("cuda")) < 1e-2


def test_refusals():
    found = refusals("cuda")
    assert all("once_differentiable" in found[name] for name in ("norm", "gate", "rotary", "loss"))
    assert found["target 4"] == "targets must be -100 or from 0 to 3; found 4"


def test_auto_takes_it(caplog: pytest.LogCaptureFixture):
    forget_backends()
    with caplog.at_level(logging.INFO, logger="kvtrain"):
        norm(torch.ones(2, 8, device="cuda"), torch.ones(8, device="cuda"))
    assert [record.message for record in caplog.records] == ["norm runs on the liger backend"]
