"""What leaves a budget and stays in a second store: a byte budget refuses it before anything changes, or not at all."""

from dataclasses import replace

import pytest
import torch

import kvtrain
from kvtrain.cache.budget import ByteBudget, CacheFullError
from tests.caches import POLICIES
from tests.hosts import make_host, random_ids

pytestmark = pytest.mark.usefixtures("no_grad")
LENGTH = 60


@pytest.mark.parametrize("preallocate", [False, True], ids=["grown", "reserved"])
@pytest.mark.parametrize(
    "changes",
    [{"every": 8}, {"every": 5, "per_head": "adaptive"}, {"budget": 0.4, "recent": 0}, {"prompt": "dense"}],
    ids=["blocks", "adaptive", "share", "dense"],
)
def test_a_budget_refuses_before_anything_changes(changes, preallocate):
    """At every length at which there may be too little, and what was refused comes later as if nothing had been."""
    method = replace(POLICIES["mikv"], **{"prompt": "blocks", "page_size": 4, **changes})
    model, ids, sizes = kvtrain.retrofit(make_host(), method), random_ids(2, LENGTH), [23, *[1] * (LENGTH - 23)]
    budget, refusals, seen = ByteBudget(2**12), 0, 0
    cache, free = model.make_cache(budget, preallocate=False), model.make_cache()
    if preallocate:
        budget = ByteBudget(2**20)
        cache = model.make_cache(budget, preallocate=True)
        budget.limit = 2**12
    cache.admit(2)
    for size in sizes:
        part = ids[:, seen : seen + size]
        expected = model(part, past_key_values=free).logits
        while True:
            before = state(cache)
            try:
                torch.testing.assert_close(model(part, past_key_values=cache).logits, expected)
                break
            except CacheFullError:
                refusals += 1
                assert all(map(torch.equal, before, state(cache)))
                budget.limit += 64
        seen += size
    assert refusals > 20 and torch.equal(cache.kv_tokens(), free.kv_tokens())
    assert cache.kv_tokens().unique().tolist() == [LENGTH]


def state(cache):
    """What every row keeps, by its position, and whether its prompt is open."""
    kept = [store.gather_row(row, head) for layer in cache.layers for store in layer.stores[:1]
            for row in range(2) for head in range(store.num_heads)]  # fmt: skip
    states = [tensor.clone() for layer in cache.layers for tensor in layer.state.tensors()]
    opened = [] if cache._open_prompts is None else [cache._open_prompts["open"].clone()]
    second = [layer.secondary.lengths.clone() for layer in cache.layers]
    return [*(tensor for row in kept for tensor in row.values()), *states, *opened, *second, cache.tokens.clone()]
