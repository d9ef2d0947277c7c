"""Window and everything, mixed: against the definition, values and gradients, gates included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.kernels import attention_mixed
from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_mixed import mixed_attention, window_attention
from kvtrain.kernels.documents import Documents
from kvtrain.models.context import document_positions

PROPERTY = settings(max_examples=120)


def leaves(seed: int, rows: int, heads: int, groups: int, length: int, dim: int = 4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads * groups, length, dim), *[(rows, heads, length, dim)] * 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*tensors, torch.rand(heads, generator=generator)]


def definition(query, key, value, gates, window, sink, documents):
    """Both attentions, dense, and mixed afterwards."""
    shared = {"documents": Documents.of(documents), "backend": "reference"}
    full, _ = attention(query, key, value, **shared)
    hidden = {"sink": sink} if documents is None else {"sinks": document_positions(documents) < sink}
    local, _ = attention(query, key, value, window=window, **hidden, **shared)
    share = gates.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]
    return (1 - share) * local + share * full


def gradients(function, tensors, seed=3):
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (output * weights).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@PROPERTY
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 4),
    st.booleans(),
)
def test_mixing_is_both_attentions_mixed(seed, heads, groups, length, window, sink, packed):
    """One document a row on the CPU's flash kernel, several by chunks; short rows see all in the window."""
    tensors = leaves(seed, 2, heads, groups, length)
    tensors[3] = tensors[3].double()
    documents = positions = None
    if packed:
        documents = torch.randint(0, 4, (2, length), generator=torch.Generator().manual_seed(seed)).sort(-1).values
        positions = document_positions(documents)
    told = {"window": window, "sink": sink, "position_ids": positions, "documents": Documents.of(documents)}
    found = gradients(lambda *t: mixed_attention(*t, **told), tensors)
    assert_same(found, gradients(lambda *t: definition(*t, window, sink, documents), tensors), 1e-10)


def test_without_the_cpu_kernel_the_parts_are_differentiated_one_by_one(monkeypatch):
    tensors = leaves(0, 2, 2, 2, 33)
    expected = gradients(lambda *t: mixed_attention(*t, window=5, sink=2), tensors)
    monkeypatch.setattr(attention_mixed, "flash_cpu_can_run", lambda *_: False)
    assert_same(gradients(lambda *t: mixed_attention(*t, window=5, sink=2), tensors), expected, 1e-6)


@pytest.mark.parametrize(("gate", "window"), [(0.0, 5), (1.0, None)])
def test_rounded_gates_choose_one_attention(gate, window):
    query, key, value, _ = leaves(1, 1, 2, 3, 29)
    chosen = attention(query, key, value, window=window, sink=2)[0]
    mixed = mixed_attention(query, key, value, torch.full((2,), gate), window=5, sink=2)
    torch.testing.assert_close(mixed, chosen, rtol=1e-12, atol=1e-12)


def test_gates_stay_in_their_own_precision():
    """Half-precision activations, float32 gates: the gates' gradient is not rounded."""
    tensors = leaves(2, 2, 2, 2, 65, dim=16, dtype=torch.bfloat16)
    found = gradients(lambda *t: mixed_attention(*t, window=7, sink=3), tensors)
    assert found[0].dtype == torch.bfloat16
    assert found[4].dtype == torch.float32
    wide = [tensor.double() for tensor in tensors]
    expected = gradients(lambda *t: mixed_attention(*t, window=7, sink=3), wide)
    torch.testing.assert_close(found[4].double(), expected[4], rtol=0.02, atol=0.3)


def test_frozen_inputs_cost_no_backward_pass_of_attention(monkeypatch):
    *inputs, gates = leaves(4, 2, 2, 2, 33)
    tracked = [tensor.requires_grad_() for tensor in (*inputs, gates.double())]
    weights = torch.randn(2, 4, 33, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad((mixed_attention(*tracked, window=5, sink=2) * weights).sum(), tracked[3:])
    monkeypatch.setattr(attention_mixed, "chunked_backward", None)
    frozen = [tensor.detach() for tensor in inputs]
    output = mixed_attention(*frozen, tracked[3], window=5, sink=2)
    assert torch.equal(torch.autograd.grad((output * weights).sum(), tracked[3:])[0], expected)


def test_several_documents_need_their_positions():
    query, key, value, _ = leaves(0, 1, 1, 1, 8)
    with pytest.raises(ValueError, match="need position_ids"):
        window_attention(query, key, value, window=3, sink=1, documents=Documents(torch.ones(1, 8, dtype=torch.long)))
