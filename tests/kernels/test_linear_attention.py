"""Linear attention: chunks, the recurrence and the dense definition are one function, gradients included."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from kvtrain.kernels.linear_attention import linear_attention, linear_attention_reference, linear_attention_step
from tests.backends import forget_backends

from .tensor_sizes import TensorSizes

NAN = float("nan")
SLOPES = torch.tensor([0.1, 0.7], dtype=torch.float64)
Attend = Callable[..., tuple[Tensor, Tensor]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors_of(
    seed: int = 0, *, batch: int = 2, heads: int = 2, length: int = 13, dim: int = 3, value_dim: int = 5, state=False
) -> dict[str, Tensor]:
    """Query, key, value and perhaps a state."""
    shapes = {"query": (length, dim), "key": (length, dim), "value": (length, value_dim), "state": (dim, value_dim)}
    names = shapes if state else list(shapes)[:3]
    return {name: normal(batch, heads, *shapes[name], seed=seed * 4 + i) for i, name in enumerate(names)}


def run(attend: Attend, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Both results, and gradients of a random linear loss of them."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output, final = attend(**leaves, **options)
    loss = (output * normal(*output.shape, seed=91)).sum() + (final * normal(*final.shape, seed=92)).sum()
    loss = loss + sum(leaf.sum() * 0 for leaf in leaves.values())  # where all is padding, an oracle depends on none
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {
        "output": output.detach(),
        "final": final.detach(),
        **{f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)},
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Every tensor is there, finite and close, measured on the largest of its entries."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].isfinite().all(), name
        if tensor.numel():
            assert (found[name] - tensor).abs().max() <= tolerance * max(1.0, float(tensor.abs().max())), name


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row and token by token, by autograd: knows nothing of chunks, masks and layouts."""
    batch, heads, length, dim = query.shape
    keep = torch.ones(heads, 1, 1) if slopes is None else torch.exp(-slopes)[:, None, None]
    rows, finals = [], []
    for row in range(batch):
        current = query.new_zeros(heads, dim, value.shape[-1]) if state is None else state[row]
        outputs, document = [], 0
        for token in range(length):
            own = 1 if document_ids is None else int(document_ids[row, token])
            if own == 0:
                outputs.append(torch.zeros_like(value[row, :, token]))
                continue
            current = current * (keep if document in (0, own) else 0.0)
            document = own
            current = current + key[row, :, token, :, None] * value[row, :, token, None]
            outputs.append((query[row, :, token, None] @ current).squeeze(1))
        rows.append(torch.stack(outputs, 1))
        finals.append(current)
    return torch.stack(rows), torch.stack(finals)


def both_ways(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence in both directions, less the diagonal; ids run backwards with their tokens."""
    output, final = recurrence(query, key, value, slopes=slopes, document_ids=document_ids)
    turned, real = None, torch.ones(())
    if document_ids is not None:
        turned, real = document_ids.flip(1), (document_ids != 0)[:, None, :, None]
    back, _ = recurrence(query.flip(2), key.flip(2), value.flip(2), slopes=slopes, document_ids=turned)
    return output + back.flip(2) - (query * key * real).sum(-1, keepdim=True) * value, final


def random_ids(batch: int, length: int, seed: int) -> Tensor:
    """Runs of ids 1 to 3, which come again, with padding anywhere."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(batch, length, generator=generator) < 0.25
    ids = 1 + changes.cumsum(1) % 3
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.3, 0)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Any]]:
    seed, length, batch = draw(st.integers(0, 10**6)), draw(st.integers(1, 20)), draw(st.integers(1, 2))
    tensors = tensors_of(seed, batch=batch, length=length, dim=draw(st.integers(1, 4)), state=draw(st.booleans()))
    slopes = draw(st.sampled_from([None, torch.tensor([0.0, 0.4]), torch.tensor([0.05, 800.0])]))
    options = {"slopes": None if slopes is None else slopes.double()}
    options["document_ids"] = random_ids(batch, length, seed) if draw(st.booleans()) else None
    return tensors, options


@settings(max_examples=60)
@given(call=calls(), chunk_size=st.integers(1, 24))
def test_chunks_recurrence_and_definition_are_one(call: tuple[dict[str, Tensor], dict[str, Any]], chunk_size: int):
    tensors, options = call
    expected = run(recurrence, tensors, **options)
    assert_same(run(linear_attention, tensors, **options, chunk_size=chunk_size), expected)
    assert_same(run(linear_attention_reference, tensors, **options), expected)


@settings(max_examples=40)
@given(call=calls(), chunk_size=st.integers(1, 24))
def test_both_ways_is_either_way_less_the_diagonal(call: tuple[dict[str, Tensor], dict[str, Any]], chunk_size: int):
    tensors, options = call
    tensors = {name: tensor for name, tensor in tensors.items() if name != "state"}
    expected = run(both_ways, tensors, **options)
    assert_same(run(linear_attention, tensors, **options, causal=False, chunk_size=chunk_size), expected)
    assert_same(run(linear_attention_reference, tensors, **options, causal=False), expected)


def test_values_by_hand():
    """Scalars 1, 2, 3 with a decay of one half, and a state of 8 before them."""
    one = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    options = {"slopes": torch.tensor([2.0]).log(), "state": torch.full((1, 1, 1, 1), 8.0)}
    output, final = linear_attention(one, one, one, **options)
    torch.testing.assert_close(output.flatten(), torch.tensor([1 * 5.0, 2 * 6.5, 3 * 12.25]))
    torch.testing.assert_close(final.flatten(), torch.tensor([12.25]))
    output, final = linear_attention(one, one, one, causal=False)
    assert output.flatten().tolist() == [14.0, 28.0, 42.0] and final.item() == 14.0


@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_a_row_may_be_cut_anywhere(slopes: Tensor | None):
    """Gradients pass through the state between the parts."""
    tensors = tensors_of(1, state=True)

    def in_two(state: Tensor, cut: int, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for part in (slice(cut), slice(cut, None)):
            own = (tensor[:, :, part] for tensor in tensors.values())
            output, state = linear_attention(*own, state=state, slopes=slopes, chunk_size=4)
            outputs.append(output)
        return torch.cat(outputs, 2), state

    expected = run(linear_attention, tensors, slopes=slopes, chunk_size=4)
    for cut in range(14):
        assert_same(run(in_two, tensors, cut=cut), expected)


@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_no_token_sees_a_later_one(slopes: Tensor | None):
    tensors = {name: tensor.float() for name, tensor in tensors_of(2, length=150, dim=16).items()}
    expected, _ = linear_attention(**tensors, slopes=slopes)
    for token in (1, 63, 64, 100, 149):
        for name in tensors:
            changed = tensors[name].clone()
            changed[:, :, token:] *= -3.0
            found, _ = linear_attention(**tensors | {name: changed}, slopes=slopes)
            assert torch.equal(found[:, :, :token], expected[:, :, :token])
            assert not torch.equal(found[:, :, token], expected[:, :, token])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_packed_is_separate(causal: bool, slopes: Tensor | None):
    lengths, tensors = [3, 1, 6, 3], tensors_of(3)
    ids = torch.repeat_interleave(torch.tensor([7, 2, 7, 5]), torch.tensor(lengths)).expand(2, -1)
    options = {"causal": causal, "slopes": slopes, "chunk_size": 4}

    def separate(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(*(tensor.split(lengths, 2) for tensor in tensors.values()), strict=True)
        results = [linear_attention(*part, **options) for part in parts]
        return torch.cat([output for output, _ in results], 2), results[-1][1]

    assert_same(run(linear_attention, tensors, document_ids=ids, **options), run(separate, tensors))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("attend", [linear_attention, linear_attention_reference])
@pytest.mark.parametrize("documents", [1, 2])
def test_padding_is_nothing(causal: bool, slopes: Tensor | None, attend: Attend, documents: int):
    """Before, behind and between the tokens; it may hold NaN."""
    tensors = tensors_of(4, length=9, state=causal)
    slots = torch.tensor([2, 3, 5, 6, 7, 11, 12, 13, 14])
    ids = torch.tensor([4] * 4 + [3 + documents] * 5)
    ids, own = torch.zeros(2, 17, dtype=torch.long).index_copy(1, slots, ids.expand(2, -1)), ids.expand(2, -1)

    def padded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        nothing = torch.full((2, 2, 17, 5), NAN, dtype=value.dtype)
        wide = (nothing[..., : part.shape[-1]].index_copy(2, slots, part) for part in (query, key, value))
        output, final = attend(*wide, document_ids=ids, **options)
        assert (output[:, :, ids[0] == 0] == 0).all()
        return output[:, :, slots], final

    options = {"causal": causal, "slopes": slopes, "chunk_size": 4}
    assert_same(run(padded, tensors, **options), run(linear_attention, tensors, document_ids=own, **options))


def test_rows_of_padding_alone():
    tensors = {name: torch.full_like(tensor, NAN) for name, tensor in tensors_of(5).items()}
    ids, state = torch.zeros(2, 13, dtype=torch.long), normal(2, 2, 3, 5)
    output, final = linear_attention(**tensors, slopes=SLOPES, state=state, document_ids=ids, chunk_size=4)
    assert (output == 0).all() and torch.equal(final, state)
    output, final = linear_attention(**tensors, causal=False, document_ids=ids)
    assert (output == 0).all() and (final == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("zero", ["query", "value", "nothing"])
def test_gradients_by_finite_differences(causal: bool, documents: bool, zero: str):
    tensors = tensors_of(6, batch=1, length=5, dim=2, value_dim=3, state=causal)
    if zero != "nothing":
        tensors[zero].zero_()
    slopes = torch.tensor([0.0, 0.3], dtype=torch.float64) if documents else None
    ids = torch.tensor([[1, 0, 1, 2, 2]]) if documents else None
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(leaves, tensors, strict=True))
        return linear_attention(**named, causal=causal, slopes=slopes, document_ids=ids, chunk_size=2)

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()))


@pytest.mark.parametrize("causal", [True, False])
def test_only_what_is_asked_for_gets_a_gradient(causal: bool):
    tensors = tensors_of(7, state=causal)
    expected = run(linear_attention, tensors, causal=causal)
    for name in tensors:
        asked = {other: tensor.clone().requires_grad_(other == name) for other, tensor in tensors.items()}
        output, final = linear_attention(**asked, causal=causal)
        loss = (output * normal(*output.shape, seed=91)).sum() + (final * normal(*final.shape, seed=92)).sum()
        loss.backward()
        assert {other for other in asked if asked[other].grad is not None} == {name}
        torch.testing.assert_close(asked[name].grad, expected[f"grad_{name}"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_does_not_depend_on_length(causal: bool, dtype: torch.dtype):
    """Half types are summed in float32: what is left is the rounding of inputs, outputs and gradients."""
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for length in (64, 2048):
        tensors = {n: t.to(dtype) for n, t in tensors_of(8, batch=1, length=length, dim=16).items()}
        slopes = torch.tensor([0.0, 0.01])
        expected = run(linear_attention, {n: t.double() for n, t in tensors.items()}, causal=causal, slopes=slopes)
        found = run(linear_attention, tensors, causal=causal, slopes=slopes)
        assert found["final"].dtype == torch.float32
        for name, tensor in expected.items():
            assert name == "final" or found[name].dtype == dtype
            assert (found[name].double() - tensor).norm() <= bound * tensor.norm(), (name, length)


def test_autocast_leaves_it_alone():
    tensors = {name: tensor.float() for name, tensor in tensors_of(9).items()}
    expected = run(linear_attention, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(linear_attention, tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_any_strides():
    tensors, options = tensors_of(10, state=True), {"slopes": SLOPES, "chunk_size": 4}

    def turned(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        views = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in tensors.items()}
        assert not views["query"].is_contiguous()
        return linear_attention(**views, **options)

    assert_same(run(turned, tensors), run(linear_attention, tensors, **options))


def test_lightning_attention_of_minimax():
    """Its recurrence and its decay, in blocks that do not divide the length."""
    config = MiniMaxConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=3, head_dim=4, block_size=8)
    layer, seen = MiniMaxLightningAttention(config, layer_idx=1), []
    layer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    hidden = normal(2, 21, 16, dtype=torch.float32)
    _, state = layer(hidden, None, None)
    parts = layer.act_fn(layer.qkv_proj(hidden)).view(2, 21, 4, 12).transpose(1, 2).split(4, dim=-1)
    output, final = linear_attention(*parts, slopes=layer.slope_rate.flatten(), chunk_size=5)
    torch.testing.assert_close(output.transpose(1, 2).flatten(2), seen[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_steps_go_on_from_a_prefix(dtype: torch.dtype, slopes: Tensor | None):
    """One, three and no tokens at a time; those that are not valid may hold NaN, and change nothing."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(11, length=9).items()}
    valid = torch.tensor([[1, 1, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 1, 1, 1, 0, 1]]).bool()
    tensors = {name: tensor.masked_fill(~valid[:, None, :, None], NAN) for name, tensor in tensors.items()}
    expected, last = linear_attention_reference(**tensors, slopes=slopes, document_ids=valid.long())

    def parts(start: int, stop: int) -> list[Tensor]:
        return [tensor[:, :, start:stop] for tensor in tensors.values()]

    output, state = linear_attention(*parts(0, 3), slopes=slopes)
    outputs, before = [output], state.clone()
    for start, stop in ((3, 4), (4, 7), (7, 7), (7, 9)):
        output, after = linear_attention_step(*parts(start, stop), state, slopes=slopes, valid=valid[:, start:stop])
        assert torch.equal(state, before) and after.dtype == last.dtype
        settings = {"slopes": slopes, "valid": valid[:, start:stop], "in_place": True}
        again, written = linear_attention_step(*parts(start, stop), before, **settings)
        assert torch.equal(again, output) and torch.equal(written, after) and written.data_ptr() == before.data_ptr()
        outputs, state, before = [*outputs, output], after, after.clone()
    assert {output.dtype for output in outputs} == {dtype}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert_same({"output": torch.cat(outputs, 2), "state": state}, {"output": expected, "state": last}, tolerance)
    free, _ = linear_attention_step(*parts(0, 3), torch.zeros_like(state), slopes=slopes)
    torch.testing.assert_close(free, outputs[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_nothing_quadratic_and_no_state_of_a_token(causal: bool, documents: bool):
    """No tensor is larger than the inputs, and none but the inputs is kept for the backward pass."""
    length = 2048
    tensors = tensors_of(12, batch=1, length=length, dim=16, value_dim=16, state=causal)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    options: dict[str, Any] = {"causal": causal, "slopes": torch.tensor([0.1, 0.0]) if documents else None}
    options["document_ids"] = random_ids(1, length, 0) if documents else None
    saved: list[Tensor] = []
    pack = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with TensorSizes() as sizes:
        with pack:
            output, final = linear_attention(**leaves, **options)
        (output.sum() + final.sum()).backward()
    assert max(sizes) <= leaves["query"].numel()
    assert sorted(tensor.data_ptr() for tensor in saved) == sorted(leaf.data_ptr() for leaf in leaves.values())


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_reads_uninitialised_memory(monkeypatch: pytest.MonkeyPatch, causal: bool):
    tensors = tensors_of(13, state=causal)
    options = {"causal": causal, "slopes": SLOPES, "document_ids": random_ids(2, 13, 1)}
    expected = run(linear_attention_reference, tensors, **options)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).fill_(NAN))
    assert torch.ones(2).new_empty(2).isnan().all()
    assert_same(run(linear_attention, tensors, **options, chunk_size=4), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [{"length": 0}, {"batch": 0}, {"heads": 0}])
def test_empty_calls(causal: bool, shape: dict[str, int]):
    tensors = tensors_of(14, **shape)
    ids = torch.ones(tensors["query"].shape[0], tensors["query"].shape[2], dtype=torch.long)
    for options in ({}, {"document_ids": ids, "slopes": torch.full(tensors["query"].shape[1:2], 0.5)}):
        found = run(linear_attention, tensors, causal=causal, **options)
        assert_same(found, run(linear_attention_reference, tensors, causal=causal, **options))
    state = normal(2, 2, 3, 5)
    assert torch.equal(linear_attention(**tensors_of(14, length=0), state=state)[1], state)


def test_the_gradient_of_a_gradient_is_refused():
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors_of(15).items()}
    output, _ = linear_attention(**leaves)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": normal(2, 1, 13, 3)}, r"one key and one value for every query and head; found query \(2, 2, 13, 3\)"),
        ({"value": normal(2, 2, 12, 5)}, r"value \(2, 2, 12, 5\)"),
        ({"slopes": torch.ones(3)}, r"slopes must be 2 constants, one a head; found \(3,\)"),
        ({"slopes": torch.ones(2, requires_grad=True)}, "detach learned ones"),
        ({"document_ids": torch.ones(2, 12)}, r"document_ids must be \(2, 13\), as the tokens; found \(2, 12\)"),
        ({"state": normal(2, 2, 5, 3)}, r"state must be \(2, 2, 3, 5\); found \(2, 2, 5, 3\)"),
        ({"state": normal(2, 2, 3, 5), "causal": False}, "pass state=None"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; found 0"),
        ({"backend": "triton"}, "backend 'triton' cannot run this call; use 'auto' or one of torch"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        linear_attention(**tensors_of(16) | changes)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture):
    forget_backends()
    with caplog.at_level(logging.INFO, logger="kvtrain"):
        for _ in range(2):
            linear_attention(**tensors_of(17))
    assert [record.message for record in caplog.records] == ["linear attention runs on the torch backend"]
