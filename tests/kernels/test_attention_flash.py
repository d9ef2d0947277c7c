"""What stands around the flash-attn library, with a dense stand-in that does what the library documents."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.kernels import attention_flash
from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_mask import AttentionMask

from .attention_cases import Case, assert_same, make_case

PROPERTY = settings(max_examples=200)
INF = float("inf")
ON_GPU = attention_flash._on_gpu


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    return_attn_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Rows, tokens, heads, channels; masks are aligned to the last query and key; the log-sum-exp has no gradient."""
    assert return_attn_probs and q.shape[3] == k.shape[3] and k.shape == v.shape
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    left, right = window_size
    hidden = (causal & (ahead > 0)) | ((left >= 0) & (-ahead > left)) | ((right >= 0) & (ahead > right))
    scores = (q @ k.mT * softmax_scale).masked_fill(hidden, -INF)
    assert not hidden.all(-1).any(), "the library says +inf here"
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1).detach(), None


@pytest.fixture(autouse=True, scope="module")
def _library() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
        patch.setattr(attention_flash, "_is_installed", lambda: True)
        patch.setattr(attention_flash, "_on_gpu", lambda tensor: True)
        patch.setattr(attention_flash, "_DTYPES", (torch.float64, torch.bfloat16))
        yield


def fits(case: Case) -> bool:
    query, key, value = (case.tensors[name] for name in ("query", "key", "value"))
    mask = AttentionMask(**{name: option for name, option in case.options.items() if name != "scale"})
    return attention_flash.flash_can_run(query, key, value, case.tensors.get("key_bias"), mask)


@st.composite
def known_cases(draw: st.DrawFn) -> Case:
    """What the library can run: no query may be blind, but for the first of a strict mask."""
    causal = draw(st.booleans())
    strict = causal and draw(st.booleans())
    window = draw(st.none() | st.integers(2 if strict else 1, 9)) if causal else None
    num_queries = draw(st.integers(2 if strict else 1, 17))
    num_keys = num_queries + draw(st.just(0) if strict else st.integers(0, 5))
    return make_case(
        draw(st.integers(0, 10**6)),
        groups=draw(st.sampled_from([1, 2, 4])),
        num_queries=num_queries,
        num_keys=num_keys if causal else draw(st.integers(1, 17)),
        dim=draw(st.sampled_from([2, 5, 8])),
        causal=causal,
        strict=strict,
        bias_after=draw(st.sampled_from([0, 1, 5])) if causal else 0,
        window=window,
        scale=draw(st.sampled_from([None, 0.7])),
    )


@PROPERTY
@given(known_cases(), st.booleans())
def test_flash_is_the_definition(case: Case, use_lse: bool):
    assert fits(case)
    assert_same(case.run("flash", use_lse=use_lse), case.run("reference", use_lse=use_lse), 1e-10)


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("strict", [False, True])
def test_windows_of_strict_masks_and_others(strict: bool, window: int | None):
    """A strict mask with a window of the token alone shows nothing, which the library cannot say."""
    case = make_case(1, num_queries=11, strict=strict, window=window)
    assert fits(case) == (not strict or window != 1)
    if fits(case):
        assert_same(case.run("flash"), case.run("reference"), 1e-10)


def test_a_loss_that_ignores_the_log_sum_exp_pays_nothing_for_it(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    backward = attention_flash.chunked_backward
    monkeypatch.setattr(attention_flash, "chunked_backward", lambda *args: calls.append(1) or backward(*args))
    case = make_case(2, strict=True)
    case.run("flash", use_lse=False)
    assert calls == []
    case.run("flash")
    assert calls == [1]


@pytest.mark.parametrize(
    "case",
    [
        make_case(3, bias="finite", bias_after=1),
        make_case(3, documents="shared"),
        make_case(3, window=3, sink=1),
        make_case(3, num_queries=7, num_keys=5),
        make_case(3, num_queries=5, num_keys=7, strict=True),
        make_case(3, num_queries=1, strict=True),
        make_case(3, value_dim=3),
        make_case(3, dim=257),
        make_case(3, dtype=torch.float32),
        make_case(3, batch=0),
        make_case(3, num_keys=0, causal=False),
    ],
    ids=[
        "bias",
        "documents",
        "sink",
        "blind",
        "strict cross",
        "strict one",
        "two widths",
        "wide",
        "dtype",
        "rows",
        "keys",
    ],
)
def test_what_the_library_does_not_know_is_refused(case: Case):
    assert not fits(case)
    with pytest.raises(ValueError, match="attention: backend 'flash' cannot run this call; use 'auto' or one of"):
        attention(**case.tensors, **case.options, backend="flash")


@pytest.mark.parametrize("missing", ["_is_installed", "_on_gpu"])
def test_without_the_library_or_the_gpu_it_is_not_there(monkeypatch: pytest.MonkeyPatch, missing: str):
    case = make_case(4, dtype=torch.bfloat16)
    assert fits(case)
    monkeypatch.setattr(attention_flash, missing, lambda *_: False)
    assert not fits(case)


def test_the_cpu_is_no_gpu():
    assert not ON_GPU(torch.ones(1))
