"""Every attention backend against the dense definition in float64 on the CPU, forward and backward."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kvtrain.kernels.attention import attention
from kvtrain.kernels.documents import Documents
from tests.backends import forget_backends
from tests.kernels.attention_cases import Case, make_case

INF = float("inf")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strict": {"strict": True},
    "window": {"window": 70},
    "strict, window": {"strict": True, "window": 3},
    "both ways": {"causal": False},
    "bias but on the own": {"bias_after": 1, "bias": "finite"},
    "bias far back": {"bias_after": 70, "bias": "finite"},
    "hiding bias, documents": {"bias_after": 1, "bias": "hiding", "documents": "shared"},
    "bias": {"bias": "finite"},
    "sink": {"window": 40, "sink": 3},
    "documents": {"documents": "shared"},
    "strict, foreign documents": {"strict": True, "documents": "foreign"},
    "both ways, hiding bias": {"causal": False, "bias": "hiding"},
    "blind": {"strict": True, "window": 1},
}
KNOWN_TO_FLASH = ("plain", "strict", "window", "strict, window", "both ways")
NEEDED = ("strict", "hiding bias, documents", "sink")  # by LCKV, DMC and Duo


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.compiler.reset()


def backends_for(mask: str, dtype: torch.dtype) -> list[str]:
    flash = mask in KNOWN_TO_FLASH and dtype != torch.float32
    return ["chunked", "flex", *(["flash"] if flash else [])]


def marks_for(backend: str, mask: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """Compilations take seconds: in other types than bfloat16 only those that an architecture needs."""
    long = backend == "flex" and dtype != torch.bfloat16 and mask not in NEEDED
    return [pytest.mark.gpu, *([pytest.mark.slow] if long else [])]


def combinations() -> list[Any]:
    """On a GPU all of them, and on the CPU what runs there too."""
    return [
        *(pytest.param("cpu", "chunked", mask, torch.bfloat16, id=f"cpu-chunked-{mask}") for mask in NEEDED),
        *(
            pytest.param("cuda", backend, mask, dtype, id=f"{backend}-{mask}-{dtype}", marks=marks)
            for dtype in TOLERANCES
            for mask in MASKS
            for backend in backends_for(mask, dtype)
            for marks in [marks_for(backend, mask, dtype)]
        ),
    ]


def moved(option: Any, device: str) -> Any:
    """An argument of ``attention`` on a device."""
    if isinstance(option, Documents):
        queries = option.queries.to(device)
        return Documents(queries, None if option.same_tokens else option.keys.to(device))
    return option.to(device) if isinstance(option, torch.Tensor) else option


def run(
    case: Case, backend: str, device: str = "cuda", *, use_lse: bool = True, checkpointed: bool = False
) -> dict[str, torch.Tensor]:
    """``Case.run`` on a device."""
    leaves = {name: tensor.to(device).detach().requires_grad_() for name, tensor in case.tensors.items()}
    options = {name: moved(option, device) for name, option in case.options.items()}

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return attention(**leaves, **options, backend=backend)

    output, lse = checkpoint(call, use_reentrant=False) if checkpointed else call()
    generator = torch.Generator().manual_seed(case.seed)
    loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(device)).sum()
    weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(device)
    if use_lse:
        loss = loss + (lse.masked_fill(lse == -INF, 0.0) * weights).sum()
    loss.backward()
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    found = {"output": output.detach(), "lse": lse.detach(), **grads}
    return {name: tensor.cpu() for name, tensor in found.items()}


def exactly(case: Case, *, use_lse: bool = True) -> dict[str, torch.Tensor]:
    wide = Case({name: tensor.double() for name, tensor in case.tensors.items()}, case.options, case.seed)
    return wide.run("reference", use_lse=use_lse)


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Every tensor is there, of its dtype, infinite where it must be, and near in norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == (torch.float32 if name == "lse" else dtype), name
        seen = tensor.isfinite()
        assert torch.equal(found[name].isfinite(), seen), name
        assert name != "lse" or found[name][~seen].eq(-INF).all()
        error = (found[name].double() - tensor)[seen].norm()
        tolerance = 1e-4 if name == "lse" else TOLERANCES[dtype]
        assert error <= tolerance * tensor[seen].norm() + 1e-6, (name, error.item())


def skip_without(backend: str) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="needs flash-attn")


@pytest.mark.parametrize(("device", "backend", "mask", "dtype"), combinations())
def test_a_backend_is_the_definition(device: str, backend: str, mask: str, dtype: torch.dtype):
    """A first length, and an odd one for which what was compiled serves any length."""
    skip_without(backend)
    for seed, length in enumerate((257, 389)):
        case = make_case(seed, num_queries=length, dim=64, dtype=dtype, **MASKS[mask])
        assert_near(run(case, backend, device), exactly(case), dtype)
    assert_near(run(case, backend, device, use_lse=False), exactly(case, use_lse=False), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("shape", [{"groups": 1}, {"groups": 4, "kv_heads": 1}, {"batch": 1}, {"dim": 80}], ids=str)
def test_shapes(backend: str, shape: dict[str, int]):
    skip_without(backend)
    case = make_case(3, num_queries=301, dtype=torch.bfloat16, **{"dim": 64, **shape})
    assert_near(run(case, backend), exactly(case), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_under_checkpointing(backend: str):
    skip_without(backend)
    case = make_case(4, num_queries=200, dim=64, dtype=torch.bfloat16, strict=True)
    assert_near(run(case, backend, checkpointed=True), exactly(case), torch.bfloat16)


@pytest.mark.gpu
def test_a_mask_of_inference_serves_training():
    case = make_case(5, num_queries=256, dim=64, dtype=torch.bfloat16, window=100)
    with torch.inference_mode():
        attention(**{name: tensor.cuda() for name, tensor in case.tensors.items()}, window=100, backend="flex")
    assert_near(run(case, "flex"), exactly(case), torch.bfloat16)


@pytest.mark.gpu
def test_more_keys_than_queries_on_flash():
    skip_without("flash")
    case = make_case(6, num_queries=70, num_keys=201, dim=64, dtype=torch.bfloat16, window=33)
    assert_near(run(case, "flash"), exactly(case), torch.bfloat16)


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_square():
    """Forward and backward over 8,192 tokens hold less than one matrix of scores."""
    length, heads = 8192, 4
    case = make_case(7, batch=1, num_queries=length, dim=64, dtype=torch.bfloat16, bias="finite", bias_after=1)
    leaves = [tensor.cuda().requires_grad_() for tensor in case.tensors.values()]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, lse = attention(*leaves[:3], key_bias=leaves[3], bias_after=1, backend="flex")
    (output.float().sum() + lse.sum()).backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length * length * 2


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["none", "finite"])
def test_auto_takes_a_kernel_of_the_gpu(bias: str, caplog: pytest.LogCaptureFixture):
    """Also where flash-attn is not installed, or does not know the call."""
    forget_backends()
    case = make_case(8, num_queries=256, dim=64, dtype=torch.bfloat16, bias=bias)
    with caplog.at_level(logging.INFO, logger="kvtrain"):
        run(case, "auto")
    taken = {record.message for record in caplog.records if record.message.startswith("attention ")}
    possible = ["flash", "flex"] if bias == "none" else ["flex"]
    assert len(taken) == 1 and taken <= {f"attention runs on the {name} backend" for name in possible}
