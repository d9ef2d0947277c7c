"""The fla backend of linear attention: how calls are put to the library, and the library itself where there is one.

It is an extra that the `dev` extra does not bring. Its kernels run on Triton's interpreter in a process of their own:
run as a module, this file prints, as JSON, how far they are from the definition in float64.
"""

import builtins
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtrain.kernels import linear_attention_fla as fla
from kvtrain.kernels.linear_attention import linear_attention, linear_attention_reference
from tests.backends import forget_backends

from .test_linear_attention_triton import backend_errors, call

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3}  # the interpreter has no bfloat16 for these kernels

# The library takes 64 tokens at a time.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"length": 66, "dim": 16, "value_dim": 16},
    "decay, state": {"length": 70, "dim": 16, "value_dim": 24, "slopes": True, "state": True},
    "documents, padding": {"batch": 2, "length": 50, "dim": 16, "value_dim": 16, "documents": True, "slopes": True},
    "documents, padding, state": {
        "batch": 2,
        "length": 90,
        "dim": 16,
        "value_dim": 24,
        "documents": True,
        "slopes": True,
        "state": True,
    },
}


def simple_gla(q, k, v, *, g_gamma, scale, initial_state, output_final_state, cu_seqlens):
    """What the library says that it computes, token by token: ``(B, T, H, D)``, or ``(1, N, H, D)`` with edges."""
    assert output_final_state and q.dtype == k.dtype == v.dtype
    if cu_seqlens is not None:
        assert len(q) == 1 and len(initial_state) == len(cu_seqlens) - 1
        edges = cu_seqlens.tolist()
        states = [None] * (len(edges) - 1) if initial_state is None else initial_state.split(1)
        rows = [
            simple_gla(
                *(part[:, start:stop] for part in (q, k, v)),
                g_gamma=g_gamma,
                scale=scale,
                initial_state=state,
                output_final_state=True,
                cu_seqlens=None,
            )
            for start, stop, state in zip(edges[:-1], edges[1:], states, strict=True)
        ]
        return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*rows, strict=True), (1, 0), strict=True))
    state = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for token in range(q.shape[1]):
        if g_gamma is not None:
            state = state * g_gamma.exp()[:, None, None]
        state = state + k[:, token, :, :, None] * v[:, token, :, None]
        outputs.append(scale * (q[:, token, :, None] @ state).squeeze(2))
    return torch.stack(outputs, 1), state


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of one function."""
    module = ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = simple_gla
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    monkeypatch.setattr(fla, "_is_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def errors(name: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Of every tensor, relative to the definition in float64."""
    return backend_errors("fla", CASES[name], dtype, device)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", CASES)
def test_calls_are_put_as_the_library_wants_them(name: str):
    """Against a stand-in that computes what the library's documentation says."""
    assert {key: value for key, value in errors(name, torch.float32).items() if not value < 2e-6} == {}


@pytest.mark.usefixtures("stand_in")
def test_rows_of_padding_alone_give_their_state_back():
    tensors, options = call(torch.float32, "cpu", **CASES["documents, padding, state"])
    for ids in (torch.zeros(2, 90, dtype=torch.long), torch.tensor([[0], [1]]).expand(2, 90)):
        options["document_ids"] = ids
        clean = {name: tensor.nan_to_num(0.5) for name, tensor in tensors.items()}
        found, expected = linear_attention(**clean, **options, backend="fla"), linear_attention(**clean, **options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[1][0], clean["state"][0]) and found[0][0].eq(0).all()


@pytest.mark.usefixtures("stand_in")
def test_factors_of_different_types_meet_in_the_wider_one():
    tensors, _ = call(torch.float16, "cpu", **CASES["plain"])
    tensors["value"] = tensors["value"].float()  # as TransNormer does
    output, _ = linear_attention(**tensors, backend="fla")
    expected, _ = linear_attention_reference(**tensors)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("stand_in")
def test_it_is_taken_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    tensors = [torch.ones(1, 1, 2, 4)] * 3
    forget_backends()
    with caplog.at_level("INFO", logger="kvtrain"):
        linear_attention(*tensors)
        monkeypatch.setenv("KVTRAIN_AVOID", "triton,torch")
        forget_backends()
        linear_attention(*tensors)
        linear_attention(*tensors, causal=False)
    forget_backends()
    assert [record.message.split()[-2] for record in caplog.records] == ["torch", "fla", "torch"]


@pytest.mark.parametrize(
    ("tensors", "causal", "answer"),
    [
        ([torch.ones(1, 1, 2, 4)] * 3, False, "it does not look ahead; pass causal=True"),
        ([torch.ones(1, 1, 2, 4).double()] * 3, True, "it has no float64; pass float32"),
        ([torch.ones(1, 1, 2, 3).half()] * 3, True, "half types need an even number of channels"),
        ([torch.ones(1, 1, 0, 4)] * 3, True, "it needs a token"),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_what_it_cannot_do_is_refused_with_the_remedy(tensors: list[Tensor], causal: bool, answer: str):
    with pytest.raises(ValueError, match=f"linear attention: backend 'fla' cannot run this call: {answer}"):
        linear_attention(*tensors, causal=causal, backend="fla")


def test_where_it_is_not_there_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    tensors = [torch.ones(1, 1, 2, 4)] * 3
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="its tensors must lie on a CUDA device; move them there"):
        linear_attention(*tensors, backend="fla")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fla, "_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"is not installed; pip install 'kvtrain\[fla\]'"):
        linear_attention(*tensors, backend="fla")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="flash-linear-attention and triton are not installed")
def test_the_library_s_kernels_are_the_definition():
    command = [sys.executable, "-m", "tests.kernels.test_linear_attention_fla"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    assert len(answers) == len(CASES) + 1
    for title, found in answers.items():
        tolerance = TOLERANCES[getattr(torch, title.rpartition(".")[2])]
        assert {key: value for key, value in found.items() if not value < tolerance} == {}, title


class Number(int):
    """A counter of a loop, which Triton's interpreter leaves a plain number, and the library converts."""

    def to(self, _: Any) -> "Number":
        return self


def prepare_interpreter() -> None:
    """Let the library's kernels run where nothing can be timed: the first configuration of each, and loops as above."""
    from fla.ops.common import chunk_h, chunk_o
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda *_, **__: [0.0] * 3
    for module in (chunk_h, chunk_o):
        module.range = lambda *bounds: map(Number, builtins.range(*map(int, bounds)))


if __name__ == "__main__":
    prepare_interpreter()
    fullest = list(CASES)[-1]
    wanted = [*((name, torch.float32) for name in CASES), (fullest, torch.float16)]
    print(json.dumps({f"{name} {dtype}": errors(name, dtype) for name, dtype in wanted}))
