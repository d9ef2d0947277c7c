"""A ring of first and latest tokens against attention under a mask, and against the methods whose windows it holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.cache.ring import RingStore
from kvtrain.cache.rows import Placement
from kvtrain.models.attention import HostAttention
from kvtrain.models.duo.attention import RoundedAttention
from kvtrain.models.eviction.attention import EvictingAttention
from kvtrain.models.paged_layers import paged_layers
from kvtrain.models.windows import attend_ring
from tests.hosts import make_host, random_ids

DIM, SCALE = 4, 0.4
DOUBLE = Placement(torch.float64)
Heads = tuple[torch.Tensor, ...]


def dense(query, key, value, sink, recent, scale=SCALE):
    """One row ``(H, T, D)``: every token over the first tokens and the latest ones, its own included."""
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    place = torch.arange(query.shape[1])
    distance = place[:, None] - place
    visible = (distance >= 0) & ((place < sink) | (distance < recent))
    scores = (query @ key.mT * scale).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value


@settings(max_examples=40)
@given(data=st.data())
def test_any_chunks_of_rows_with_any_pasts_are_dense_attention(data):
    """Rows come to different lengths by themselves, then go on together in one call after the other."""
    draw = data.draw
    sink, recent = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pasts = draw(st.lists(st.integers(0, 17), min_size=1, max_size=3))
    chunks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    rows = [
        [
            torch.randn(count, past + sum(chunks), DIM, dtype=torch.float64, generator=generator)
            for count in (heads * groups, heads, heads)
        ]
        for past in pasts
    ]
    ring = RingStore(heads, DIM, recent, sink, DOUBLE)
    for row, past in zip(rows, pasts, strict=True):  # alone, in chunks of their own
        own = RingStore(heads, DIM, recent, sink, DOUBLE)
        own.admit(1)
        begin = 0
        while begin < past:
            end = min(past, begin + draw(st.integers(1, 7)))
            check(own, [row], [begin], end - begin)
            begin = end
        ring.join(own)
    begins = list(pasts)
    for size in chunks:
        check(ring, rows, begins, size)
        begins = [begin + size for begin in begins]
    assert ring["tokens"].tolist() == begins


def check(ring, rows, begins, size):
    """The next tokens of every row, so many each, which the ring takes up."""
    new = [
        torch.stack([row[part][:, begin : begin + size] for row, begin in zip(rows, begins, strict=True)])
        for part in range(3)
    ]
    output = attend_ring(ring, *new, scale=SCALE)
    for found, row, begin in zip(output, rows, begins, strict=True):
        expected = dense(*(part[:, : begin + size] for part in row), ring.sink, ring.recent)
        torch.testing.assert_close(found, expected[:, begin:], atol=1e-12, rtol=0)


@contextmanager
def recorded(kind: type[HostAttention], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[Heads]]]:
    """Queries, keys, values and outputs of each layer's passes over a cache, ``(B, H, n, D)``."""
    passes: dict[int, list[Heads]] = {}
    serve = kind._serve

    def watched(self, query, key, value, *rest):
        output = serve(self, query, key, value, *rest)
        heads = output if isinstance(output, torch.Tensor) else output[0]
        passes.setdefault(self.layer_idx, []).append((query, key, value, heads))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_serve", watched)
        yield passes


STREAMING = {"prompt": "blocks", "page_size": 4}
METHODS = {
    "streamingllm": (EvictingAttention, kvtrain.StreamingLLM(budget=9, sink=2, **STREAMING)),
    "streamingllm without sinks": (EvictingAttention, kvtrain.StreamingLLM(budget=5, sink=0, **STREAMING)),
    "streamingllm of sinks alone": (EvictingAttention, kvtrain.StreamingLLM(budget=3, sink=3, **STREAMING)),
    "duo": (RoundedAttention, kvtrain.Duo(sink=2, recent=5, full_heads=((1,), (0,)), page_size=4)),
    "duo without sinks": (RoundedAttention, kvtrain.Duo(sink=0, recent=7, full_heads=((), ()), page_size=4)),
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_ring_of_a_plan_shows_what_the_method_shows(name, monkeypatch):
    """Prompt, single tokens, a chunk: the same queries, keys and values give what the method's own cache gives."""
    kind, method = METHODS[name]
    model = kvtrain.retrofit(make_host(heads=4, kv_heads=2), method)
    ids, cache = random_ids(2, 40), model.make_cache()
    with recorded(kind, monkeypatch) as passes:
        for begin, end in ((0, 3), (3, 4), (4, 19), *((token, token + 1) for token in range(19, 34)), (34, 40)):
            model(ids[:, begin:end], past_key_values=cache)
    assert passes.keys() == {0, 1}
    for layer, plan in enumerate(paged_layers(model.config)):
        assert plan.ring is not None
        store = RingStore(plan.ring.num_heads, plan.ring.head_dim, plan.ring.recent, plan.ring.sink, DOUBLE)
        store.admit(2)
        scale, paged = model.model.layers[layer].self_attn.scaling, plan.num_paged_heads
        for query, key, value, output in passes[layer]:
            streaming = query[:, 2 * paged :], key[:, paged:], value[:, paged:]
            found = attend_ring(store, *streaming, scale=scale)
            torch.testing.assert_close(found, output[:, 2 * paged :], atol=1e-12, rtol=0)
