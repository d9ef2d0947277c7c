"""Attention within blocks against a dense mask: values, gradients, earlier tokens, dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.kernels.block_attention import Past, block_attention

TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(query, key, value, seen, weights):
    """Attention under an explicit mask ``(B, T, S)``."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    seen = seen[:, None]
    if weights == "relu":
        return (scores.clamp(min=0) * seen) @ value
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


def seen_by(ids, earlier=None, causal=True):
    """Which keys, earlier ones first, the tokens of blocks ``ids (B, T)`` see."""
    seen = ids[:, :, None] == ids[:, None, :]
    if causal:
        seen = seen & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    return seen if earlier is None else torch.cat([ids[:, :, None] == earlier[:, None, :], seen], 2)


def assert_same(run, expected, tensors):
    """Two functions of tensors have the same values and gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    ours, theirs = run(*leaves), expected(*leaves)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    weight = normal(*ours.shape, seed=99)
    for found, right in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((theirs * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, right, **TOLERANCE)


KINDS = pytest.mark.parametrize("weights", ["softmax", "relu"])
WAYS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])


@KINDS
@WAYS
@settings(max_examples=12)
@given(length=st.integers(1, 23), size=st.integers(1, 9), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_blocks_at_every_wth_token(weights, causal, length, size, batch, seed):
    tensors = [normal(batch, 2, length, width, seed=3 * seed + i) for i, width in enumerate((4, 4, 3))]
    ids = (torch.arange(length) // size).expand(batch, -1)
    named = {"block_size": size, "weights": weights, "causal": causal}
    if weights == "softmax":
        tensors[2] = normal(batch, 2, length, 4, seed=3 * seed + 2)
    expected = lambda q, k, v: dense(q, k, v, seen_by(ids, causal=causal), weights)  # noqa: E731
    assert_same(lambda *qkv: block_attention(*qkv, **named), expected, tensors)
    assert_same(lambda *qkv: block_attention(*qkv, **named, block_ids=ids), expected, tensors)


@st.composite
def rows_of_blocks(draw, length, size):
    """Ids of blocks of at most ``size`` tokens side by side, in no order of their numbers."""
    ids = []
    while len(ids) < length:
        ids += [draw(st.integers(0, 3)) * 1000 + len(ids)] * draw(st.integers(1, size))
    return ids[:length]


@KINDS
@WAYS
@settings(max_examples=20)
@given(data=st.data(), length=st.integers(1, 23), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_blocks_that_begin_anywhere(weights, causal, data, length, size, seed):
    ids = torch.tensor([data.draw(rows_of_blocks(length, size)) for _ in range(2)])
    tensors = [normal(2, 2, length, 4, seed=3 * seed + i) for i in range(3)]
    assert_same(
        lambda *qkv: block_attention(*qkv, block_size=size, weights=weights, causal=causal, block_ids=ids),
        lambda q, k, v: dense(q, k, v, seen_by(ids, causal=causal), weights),
        tensors,
    )


@KINDS
@settings(max_examples=20)
@given(data=st.data(), length=st.integers(1, 17), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_earlier_tokens_of_the_first_block(weights, data, length, size, seed):
    """Rows stand at other places of their blocks; what is none is never seen, whatever it holds."""
    stands = torch.tensor(data.draw(st.lists(st.integers(0, 3 * size), min_size=2, max_size=2)))
    ids = (stands[:, None] + torch.arange(length)) // size
    places = stands[:, None] - size + torch.arange(size)
    earlier = torch.where(places < 0, -1, places // size)
    tensors = [normal(2, 2, length, 4, seed=5 * seed + i) for i in range(3)]
    tensors += [normal(2, 2, size, 4, seed=5 * seed + i) for i in (3, 4)]
    assert_same(
        lambda q, k, v, past_k, past_v: block_attention(
            q, k, v, block_size=size, weights=weights, block_ids=ids, past=Past(past_k, past_v, earlier)
        ),
        lambda q, k, v, past_k, past_v: dense(
            q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2), seen_by(ids, earlier), weights
        ),
        tensors,
    )


@KINDS
@WAYS
@pytest.mark.parametrize("aligned", [True, False])
def test_other_blocks_change_nothing(weights, causal, aligned):
    tensors, size = [normal(1, 2, 21, 4, seed=i) for i in range(3)], 4
    named = {"block_size": size, "weights": weights, "causal": causal}
    if not aligned:
        named["block_ids"] = (torch.arange(21)[None] + 1) // size
    before = block_attention(*tensors, **named)
    for tensor in tensors:
        tensor[:, :, 9] += 1.0
    after = block_attention(*tensors, **named)
    block = slice(8, 12) if aligned else slice(7, 11)
    others = torch.ones(21, dtype=torch.bool)
    others[block] = False
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert not torch.equal(before[:, :, 9], after[:, :, 9])


@KINDS
def test_blocks_of_one_token(weights):
    """Softmax of one score is the value; ReLU of it the score's part above zero, times the value."""
    query, key, value = (normal(2, 2, 7, 4, seed=i) for i in range(3))
    score = (query * key).sum(-1, keepdim=True) / 2
    expected = value if weights == "softmax" else score.clamp(min=0) * value
    torch.testing.assert_close(block_attention(query, key, value, block_size=1, weights=weights), expected, **TOLERANCE)


@KINDS
@pytest.mark.parametrize("aligned", [True, False])
def test_dropout_keeps_the_expectation(weights, aligned):
    """Of 40,000 draws at one share in four, mean and variance are what dropping single weights gives."""
    draws, share = 40_000, 0.25
    query, key, value = (normal(1, 1, 3, 2, seed=i) for i in range(3))
    ids = None if aligned else torch.zeros(1, 3, dtype=torch.long)
    many = [tensor.expand(draws, 1, 3, 2) for tensor in (query, key, value)]
    settings_ = {"block_size": 3, "weights": weights, "causal": False}
    given_ids = None if ids is None else ids.expand(draws, 3)
    found = block_attention(*many, **settings_, block_ids=given_ids, dropout=share)
    seen = seen_by(torch.zeros(1, 3, dtype=torch.long), causal=False)
    kept = dense(query, key, value, seen, weights)
    parts = dense(query, key, torch.eye(3, dtype=torch.float64)[None, None], seen, weights)[0, 0]  # weights (T, S)
    variance = share / (1 - share) * parts.square() @ value[0, 0].square()
    deviation = (variance / draws).sqrt()
    assert bool((found.mean(0)[0] - kept[0, 0]).abs().le(4.5 * deviation + 1e-12).all())
    torch.testing.assert_close(found.var(0)[0], variance, rtol=0.1, atol=1e-12)
    torch.testing.assert_close(block_attention(query, key, value, **settings_, block_ids=ids), kept, **TOLERANCE)
