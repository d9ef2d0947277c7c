"""Every attention backend against the dense definition, forward and backward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from kvtrain.kernels import attention_chunked, attention_cpu
from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.documents import Documents

from .attention_cases import HIDING, KINDS, Case, assert_same, cases, make_case
from .tensor_sizes import TensorSizes

PROPERTY = settings(max_examples=250)
FEW = settings(PROPERTY, max_examples=30)
INF = float("inf")


def test_the_definition_agrees_with_torch():
    case = make_case(0, groups=1, num_queries=9)
    expected = torch.nn.functional.scaled_dot_product_attention(**case.tensors, is_causal=True)
    output, lse = attention(**case.tensors, backend="reference")
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert lse[0, 0, 0].item() == pytest.approx(
        (case.tensors["query"][0, 0, 0] @ case.tensors["key"][0, 0, 0]).item() / 2, abs=1e-12
    )


def test_the_definition_by_hand():
    """Two keys, and a bias that touches the other key alone."""
    query = torch.tensor([[[[1.0], [2.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[0.5], [1.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[3.0], [5.0]]]], dtype=torch.float64)
    bias = torch.tensor([[[-0.25, -7.0]]], dtype=torch.float64)
    output, lse = attention(query, key, value, key_bias=bias, bias_after=1, scale=1.0, backend="reference")
    past, own = torch.tensor([2.0 * 0.5 - 0.25, 2.0 * 1.0], dtype=torch.float64).exp()
    assert output.flatten().tolist() == pytest.approx([3.0, ((3 * past + 5 * own) / (past + own)).item()])
    assert lse.flatten().tolist() == pytest.approx([0.5, (past + own).log().item()])
    _, strict = attention(query, key, value, key_bias=bias, strict=True, scale=1.0, backend="reference")
    assert strict.flatten().tolist() == [-INF, pytest.approx(0.75)]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_bias_that_begins_three_tokens_back(backend: str):
    """All scores are 0, so a query's log-sum-exp counts keys: each of the latest three as 1, earlier ones by bias."""
    zeros, values = torch.zeros(1, 1, 5, 1, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)[None, None]
    bias = torch.tensor([[[0.5, 0.25, 0.1, 0.1, 0.1]]], dtype=torch.float64).log().requires_grad_()
    call = {"key_bias": bias, "bias_after": 3, "backend": backend, "chunk_size": 2}
    output, lse = attention(zeros, zeros, values.unsqueeze(-1), **call)
    assert lse.exp().flatten().tolist() == pytest.approx([1, 2, 3, 3.5, 3.75])
    sums = [0, 1, 1 + 2, 0 * 0.5 + 1 + 2 + 3, 0 * 0.5 + 1 * 0.25 + 2 + 3 + 4]
    assert (output * lse.exp().unsqueeze(-1)).flatten().tolist() == pytest.approx(sums)
    (grad,) = torch.autograd.grad(lse.sum(), bias)  # a biased key's weights: with the fourth query, with the fifth
    assert grad.flatten().tolist() == pytest.approx([0.5 / 3.5 + 0.5 / 3.75, 0.25 / 3.75, 0, 0, 0])
    _, strict = attention(zeros, zeros, zeros, strict=True, **call)
    assert strict.exp().flatten().tolist() == pytest.approx([0, 1, 2, 2.5, 2.75])


@PROPERTY
@given(cases(square=False), st.integers(1, 20))
def test_chunked_is_the_definition(case: Case, chunk_size: int):
    assert_same(case.run("chunked", chunk_size=chunk_size), case.run("reference"), 1e-10)


@PROPERTY
@given(cases(square=True), st.booleans())
def test_flash_cpu_is_the_definition(case: Case, use_lse: bool):
    assert_same(case.run("flash_cpu", use_lse=use_lse), case.run("reference", use_lse=use_lse), 1e-10)


@pytest.mark.parametrize(("empty", "width"), [((), 9), (("query",), 9), (("key",), 9), (("query", "key"), 8)])
def test_a_bias_travels_in_a_channel_that_both_sides_leave_empty(
    monkeypatch: pytest.MonkeyPatch, empty: tuple[str, ...], width: int
):
    flash, widths = attention_cpu.flash, []

    def spy(query, key, value, **options):
        widths.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return flash(query, key, value, **options)

    monkeypatch.setattr(attention_cpu, "flash", spy)
    case = make_case(5, batch=1, num_queries=23, dim=8, bias="hiding", bias_after=1, empty=empty)
    assert_same(case.run("flash_cpu", use_lse=False), case.run("reference", use_lse=False), 1e-10)
    assert widths == [(width, width, width)]


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu"])
def test_a_long_odd_call(backend: str):
    """Longer than the kernel's blocks and the default chunk."""
    case = make_case(3, batch=1, num_queries=531, dim=8, bias="hiding", bias_after=1, documents="shared")
    assert_same(case.run(backend, chunk_size=256), case.run("reference"), 1e-10)


@pytest.mark.parametrize(
    ("ids", "masks"), [([[1, 1, 2, 3, 3, 0], [4, 5, 5, 5, 6, 6]], 0), ([[1, 2, 2, 1, 1, 3]] * 2, 2)]
)
@pytest.mark.parametrize("kind", HIDING)
def test_documents_that_are_runs_need_no_mask(
    monkeypatch: pytest.MonkeyPatch, ids: list[list[int]], masks: int, kind: str
):
    """Runs of a single token among them; a document that was left and comes again is masked, forward and backward."""
    made: list[bool] = []
    make = attention_cpu._additive_mask

    def spy(*args):
        made.append((additive := make(*args)) is not None)
        return additive

    monkeypatch.setattr(attention_cpu, "_additive_mask", spy)
    case = make_case(20, num_queries=6, **HIDING[kind])
    case.options["documents"] = Documents(torch.tensor(ids))
    assert_same(case.run("flash_cpu", use_lse=False), case.run("reference", use_lse=False), 1e-10)
    assert sum(made) == masks


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_derivatives(backend: str, kind: str):
    case = make_case(1, batch=1, num_queries=5, dim=3, window=3, sink=1, **KINDS[kind])
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(case.tensors, tensors, strict=True))
        output, lse = attention(**named, **case.options, backend=backend, chunk_size=2)
        return output, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu", "reference"])
def test_a_query_that_sees_nothing(backend: str):
    """Zeros, -inf, and gradients that are finite: exactly 0 where only the blind query could send any."""
    case = make_case(2, num_queries=6, strict=True, window=1)
    found = case.run(backend)
    assert found["lse"].eq(-INF).all()
    for name in ("output", "grad_query", "grad_key", "grad_value"):
        assert found[name].eq(0.0).all(), name


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_keys_that_are_all_hidden_by_their_bias(backend: str):
    case = make_case(4, bias="finite", causal=False)
    case.tensors["key_bias"][0] = -INF
    found = case.run(backend)
    assert found["lse"][0].eq(-INF).all() and found["output"][0].eq(0.0).all()
    assert found["lse"][1].isfinite().all()
    for name, tensor in found.items():
        assert name == "lse" or (tensor.isfinite().all() and tensor[0].eq(0.0).all()), name


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu"])
@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("use_lse", [True, False])
def test_nothing_reads_uninitialised_memory(monkeypatch: pytest.MonkeyPatch, backend: str, kind: str, use_lse: bool):
    case = make_case(5, num_queries=11, window=4, sink=2, documents="shared", **HIDING[kind])
    expected = case.run("reference", use_lse=use_lse)
    poison(monkeypatch)
    assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    assert_same(case.run(backend, use_lse=use_lse), expected, 1e-10)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever is allocated without a value with NaN."""

    def poisoned(allocate: Any) -> Any:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(10**6))

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (5, 2)])
def test_bf16_stays_near_fp32(backend: str, kind: str, window: int | None, sink: int):
    """Half tensors in, their own dtype out, a wide log-sum-exp, and errors of bf16 rounding alone."""
    options = {"num_queries": 65, "dim": 16, "window": window, "sink": sink, **KINDS[kind]}
    case = make_case(6, dtype=torch.bfloat16, **options)
    exact = Case({name: tensor.double() for name, tensor in case.tensors.items()}, case.options, case.seed)
    found, expected = case.run(backend, chunk_size=16), exact.run("reference")
    assert found["lse"].dtype == torch.float32
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in found.items() if name != "lse")
    for name, tensor in expected.items():
        seen = tensor.isfinite()
        assert torch.equal(seen, found[name].isfinite()), name
        error = (found[name].double() - tensor)[seen].norm() / tensor[seen].norm()
        assert error < 0.01, (name, error)


def test_half_scores_are_not_rounded():
    """Large scores: a log-sum-exp built on bf16 products would be off by a hundredth and more."""
    case = make_case(7, num_queries=33, dim=64, dtype=torch.bfloat16)
    tensors = {name: tensor * 3 for name, tensor in case.tensors.items()}
    exact = attention(**{name: tensor.double() for name, tensor in tensors.items()}, backend="reference")[1]
    for backend in ("chunked", "reference", "flash_cpu"):
        assert (attention(**tensors, backend=backend)[1] - exact).abs().max() < 1e-4, backend


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu"])
def test_autocast_does_not_change_what_was_asked(backend: str):
    case = make_case(8, dtype=torch.float32, bias="finite", bias_after=1)
    expected = case.run(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run(backend)
        definition = attention(**case.tensors, **case.options, backend="reference")
    assert torch.allclose(definition[0], expected["output"], atol=1e-6)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


@FEW
@given(cases(square=False), st.integers(1, 3))
def test_merged_parts_are_the_whole(case: Case, num_parts: int):
    """Attention over disjoint key sets, merged, is attention over all keys, gradients included."""
    visible = {name: value for name, value in case.options.items() if name in ("causal", "scale")}
    whole = Case(case.tensors | {"key_bias": bias_of(case)}, {**visible, "causal": False}, case.seed)
    expected = whole.run("reference")
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in whole.tensors.items()}
    pieces = torch.arange(leaves["key"].shape[2]).tensor_split(num_parts)
    parts = []
    for piece in pieces:
        keyed = {name: leaves[name][:, :, piece] for name in ("key", "value", "key_bias")}
        parts.append(attention(leaves["query"], **keyed, **whole.options, backend="chunked"))
    found = backward_through(merge_attention(parts), leaves, case.seed)
    assert_same(found, expected, 1e-10)


def bias_of(case: Case) -> torch.Tensor:
    return case.tensors.get("key_bias", torch.zeros(case.tensors["key"].shape[:3], dtype=torch.float64))


def backward_through(
    result: tuple[torch.Tensor, torch.Tensor], leaves: dict[str, torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
    """The loss of ``Case.run`` on a given result."""
    output, lse = result
    generator = torch.Generator().manual_seed(seed)
    loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    (loss + (lse.masked_fill(lse == -INF, 0.0) * weights).sum()).backward()
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), "lse": lse.detach(), **grads}


def test_parts_that_see_nothing_merge_into_nothing():
    """More queries than keys: the first ones are blind in every part."""
    leaves = {name: tensor.requires_grad_() for name, tensor in make_case(9, num_queries=6, num_keys=4).tensors.items()}
    whole = attention(**leaves, backend="chunked")
    output, lse = merge_attention([whole, whole])
    assert lse[:, :, :2].eq(-INF).all() and output[:, :, :2].eq(0.0).all()
    torch.testing.assert_close(lse[:, :, 2:], whole[1][:, :, 2:] + torch.tensor(2.0).log(), check_dtype=False)
    torch.testing.assert_close(output, whole[0])
    (output.sum() + lse[:, :, 2:].sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_never_reaches_back(backend: str, kind: str, dtype: torch.dtype):
    """Another token from t on changes nothing before t, to the bit, and something at or after t."""
    options = {"num_queries": 37, "dim": 8, "dtype": dtype, **KINDS[kind]}
    case = make_case(10, **options)
    other = make_case(11, **options)
    before = attention(**case.tensors, **case.options, backend=backend, chunk_size=8)
    for t in (0, 1, 17, 36):
        changed = {name: tensor.clone() for name, tensor in case.tensors.items()}
        for name, tensor in changed.items():
            tensor[:, :, t:] = other.tensors[name][:, :, t:]
        after = attention(**changed, **case.options, backend=backend, chunk_size=8)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, :, :t], new[:, :, :t])
            assert t == 36 or not torch.equal(old[:, :, t:], new[:, :, t:])


@pytest.mark.parametrize("shape", [{"batch": 0}, {"num_queries": 0}, {"num_keys": 0}])
def test_empty_calls(shape: dict[str, int]):
    case = make_case(12, **{"num_keys": 5, **shape})
    found = case.run("chunked")
    assert found["output"].shape == case.tensors["query"].shape
    assert found["output"].eq(0.0).all() and found["lse"].eq(-INF).all()


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu"])
def test_under_checkpointing(backend: str):
    case = make_case(13, bias="finite", bias_after=1)
    expected = case.run(backend)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    result = checkpoint(lambda: attention(**leaves, **case.options, backend=backend, chunk_size=3), use_reentrant=False)
    assert_same(backward_through(result, leaves, case.seed), expected, 0.0)


def test_gradients_of_gradients_are_refused():
    case = make_case(14)
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    for backend in ("chunked", "flash_cpu"):
        output, _ = attention(*leaves, backend=backend)
        (grad,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_auto_picks_what_can_run(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    for module, name in ((attention_cpu, "FlashAttentionCPU"), (attention_chunked, "ChunkedAttention")):
        kind = getattr(module, name)
        spy = SimpleNamespace(apply=lambda *args, k=kind, n=name: calls.append(n) or k.apply(*args))
        monkeypatch.setattr(f"kvtrain.kernels.attention.{name}", spy)
    square, long = make_case(15), make_case(15, num_keys=9)
    biased = make_case(15, bias="finite")
    documents = make_case(15, documents="foreign")
    for case in (square, long, biased, documents):
        attention(**case.tensors, **case.options)
    assert calls == ["FlashAttentionCPU", *["ChunkedAttention"] * 3]


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (make_case(16, num_keys=9), {"backend": "flash_cpu"}),
        (make_case(16, bias="finite"), {"backend": "flash_cpu"}),
        (make_case(16, bias="finite", bias_after=2), {"backend": "flash_cpu"}),
        (make_case(16, bias="finite", bias_after=1, strict=True), {"backend": "flash_cpu"}),
        (make_case(16, documents="foreign"), {"backend": "flash_cpu"}),
        (make_case(16), {"backend": "flash_cpu", "causal": False}),
        (make_case(16), {"backend": "cuda"}),
    ],
)
def test_an_unavailable_backend_is_an_error(case: Case, wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"attention: backend '{wrong['backend']}' cannot run this call; use 'auto'"):
        attention(**case.tensors, **case.options, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bias_after": -1}, "bias_after must not be negative"),
        ({"window": 0}, "window must be at least 1"),
        ({"sink": -1}, "sink must not be negative"),
        ({"window": 3, "causal": False}, "need causal=True"),
        ({"bias_after": 1, "causal": False}, "need causal=True"),
        ({"strict": True, "causal": False}, "need causal=True"),
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attention(**make_case(17).tensors, **wrong)


def test_heads_that_cannot_share_are_refused():
    tensors = make_case(18, groups=1, kv_heads=3).tensors
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key-value heads"):
        attention(tensors["query"], tensors["key"][:, :2], tensors["value"][:, :2])


def test_memory_grows_with_the_chunk_not_with_the_square():
    """No tensor of T x T elements is made, forward or backward."""
    length, chunk = 512, 32
    case = make_case(19, batch=1, groups=1, kv_heads=1, num_queries=length, dim=4, bias="finite", bias_after=1)
    with TensorSizes() as sizes:
        case.run("chunked", chunk_size=chunk)
    assert max(sizes) == chunk * length
