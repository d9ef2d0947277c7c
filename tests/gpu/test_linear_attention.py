"""Linear attention on a GPU: what the interpreter checks on the CPU, and lengths that it is too slow for."""

import logging

import pytest
import torch

from kvtrain.kernels.linear_attention import linear_attention
from tests.backends import forget_backends
from tests.kernels import test_linear_attention_fla as fla
from tests.kernels.test_linear_attention_triton import CASES, TOLERANCES, errors, normal, run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="needs triton")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_definition(name: str, dtype: torch.dtype):
    found = errors(name, dtype, "cuda")
    assert {key: value for key, value in found.items() if not value < max(TOLERANCES[dtype], 1e-5)} == {}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels", [64, 128])
def test_long_rows_are_as_on_the_cpu(dtype: torch.dtype, channels: int):
    """Against the torch backend in float64, at lengths where a scan has hundreds of chunks."""
    tensors = {
        name: normal(1, 4, 8_193, channels, seed=i).to(dtype) for i, name in enumerate(("query", "key", "value"))
    }
    slopes = torch.tensor([0.0, 0.001, 0.1, 1.0])
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = run(linear_attention, wide, {"slopes": slopes})
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    found = run(linear_attention, on_gpu, {"slopes": slopes.cuda(), "backend": "triton"})
    for name, tensor in expected.items():
        error = (found[name].cpu().double() - tensor).norm() / tensor.norm()
        assert error < max(TOLERANCES[dtype], 1e-5), name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", fla.CASES)
def test_fla_is_the_definition(name: str, dtype: torch.dtype):
    """Where the extra is installed; it multiplies float32 in tf32, and rounds its states to half types."""
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    found = fla.errors(name, dtype, "cuda")
    assert {key: value for key, value in found.items() if not value < 2e-2} == {}


def test_auto_takes_it(caplog: pytest.LogCaptureFixture):
    forget_backends()
    with caplog.at_level(logging.INFO, logger="kvtrain"):
        linear_attention(*(torch.ones(1, 2, 8, 16, device="cuda") for _ in range(3)))
    assert [record.message for record in caplog.records] == ["linear attention runs on the triton backend"]


def test_float64_goes_to_torch():
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call"):
        linear_attention(*(torch.ones(1, 2, 8, 16, device="cuda").double() for _ in range(3)), backend="triton")
