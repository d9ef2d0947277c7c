"""Pages of a pool, and the byte budget: what does not fit is refused, and then nothing has changed."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtrain.cache.base import KVCache
from kvtrain.cache.budget import ByteBudget, CacheFullError
from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.pool import PagePool
from kvtrain.cache.ring import RingStore
from kvtrain.cache.rows import Placement

from .test_paged import append
from .test_state import RUN

HEADS, DIM, VALUE_DIM, PAGE_SIZE = 2, 3, 2, 4
DIMS = {"keys": DIM, "values": VALUE_DIM}
PAGE_BYTES = PAGE_SIZE * (DIM + VALUE_DIM) * 8
ROOMY = 10**6
WINDOW_BYTES = 7 * HEADS * (DIM + VALUE_DIM) * 8 + 8


def make_pool(budget=None):
    return PagePool(PAGE_SIZE, DIMS, Placement(torch.float64, budget=budget))


def empty_store(budget=None):
    return PagedStore(HEADS, DIMS, PAGE_SIZE, Placement(torch.float64, budget=budget))


def make_store(budget=None, counts=((9, 2), (5, 0))):
    """Two rows of six pages."""
    store = empty_store(budget)
    store.admit(len(counts))
    append(store, counts)
    return store


def state(store):
    """Everything that a refusal must leave alone."""
    return [tensor.clone() for tensor in store.tensors()]


def same(before, after):
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@RUN
@given(st.lists(st.tuples(st.sampled_from(["take", "release", "shrink"]), st.integers(0, 40), st.integers(0, 9))))
def test_pages_keep_their_contents_and_have_one_owner(steps):
    pool, owned, clock = make_pool(), torch.zeros(0, dtype=torch.long), 0
    marks = torch.zeros(0, dtype=torch.float64)
    for action, count, spare in steps:
        if action == "take":
            size, free = pool.num_pages, len(pool.free)
            fresh = pool.take(count, spare)
            grown = max(0, count - free)
            assert size + grown <= pool.num_pages <= size + grown + min(spare, size // 16) * (grown > 0)
            new = torch.arange(clock, clock + count, dtype=torch.float64)
            pool.slots["keys"][fresh], pool.slots["values"][fresh] = new[:, None, None], -new[:, None, None]
            owned, marks, clock = torch.cat([owned, fresh]), torch.cat([marks, new]), clock + count
        elif action == "release":
            pool.release(owned[:count])
            owned, marks = owned[count:], marks[count:]
        else:
            numbers = pool.shrink(spare)
            assert len(pool.free) <= spare or numbers is None
            owned = owned if numbers is None else numbers[owned]
        assert sorted([*owned.tolist(), *pool.free.tolist()]) == list(range(pool.num_pages))
        assert pool.slots["keys"][owned].flatten(1).eq(marks[:, None]).all()
        assert pool.slots["values"][owned].flatten(1).eq(-marks[:, None]).all()
        assert all(slots.isfinite().all() for slots in pool.tensors())


def test_shrink_leaves_the_spare_and_moves_no_page_without_need():
    pool = make_pool()
    pages = pool.take(10, 0)
    assert pool.shrink(0) is None
    pool.release(pages[[1, 4, 8]])
    assert pool.shrink(3) is None and pool.num_pages == 10
    numbers = pool.shrink(1)
    assert pool.num_pages == 8 and pool.free.tolist() == [4]
    assert numbers[[0, 2, 3, 5, 6, 7, 9]].tolist() == [0, 2, 3, 5, 6, 7, 1]


def test_pages_begin_as_zeros_and_memory_is_never_read_as_found(monkeypatch):
    monkeypatch.setattr(torch, "empty", None)
    monkeypatch.setattr(torch.Tensor, "new_empty", None)
    pool = make_pool()
    pool.take(40, 0)
    pool.take(1, 9)
    assert pool.num_pages == 43 and pool.slots["keys"].eq(0).all() and pool.slots["values"].eq(0).all()


def test_spare_pages_never_use_up_the_budget():
    """One for every sixteen, but not where the limit forbids them, and no more than the caller allows."""
    budget = ByteBudget(ROOMY)
    for wanted, limit, spare in ((10, None, 4), (3, None, 3), (10, 3, 2), (10, 1, 0)):
        pool = PagePool(PAGE_SIZE, DIMS, Placement(budget=budget))
        pool.take(64, 0)
        budget.limit = ROOMY if limit is None else budget.used + limit * pool.page_bytes
        pool.take(1, wanted)
        assert len(pool.free) == spare and pool.num_pages == 65 + spare


@pytest.mark.parametrize("limit", [0, -1])
def test_a_budget_is_positive(limit):
    with pytest.raises(ValueError, match=f"must be positive, not {limit}; pass None"):
        ByteBudget(limit)


def test_two_stores_share_a_budget_and_a_forgotten_one_leaves_it():
    budget = ByteBudget(ROOMY)
    first, second = make_store(budget), make_store(budget)
    assert budget.used == first.num_bytes() + second.num_bytes() and budget.left == ROOMY - budget.used
    budget.limit = budget.used + 5 * PAGE_BYTES
    before = state(second)
    needed = 6 * PAGE_BYTES + 2 * HEADS * 6 * 4  # and as many columns of the table
    message = f"may take {needed:,} bytes more, but {budget.used:,} of a budget of {budget.limit:,} are in use: free"
    with pytest.raises(CacheFullError, match=message):
        append(second, [(24, 0), (0, 0)])
    assert same(before, state(second)) and isinstance(CacheFullError(), ValueError)
    del first
    gc.collect()
    assert budget.used == second.num_bytes()
    append(second, [(24, 0), (0, 0)])
    assert budget.used == second.num_bytes()
    second.reset()
    assert budget.used == 0 and budget.left == budget.limit


def restore_larger(store):
    other = make_store(counts=[(17, 17)])
    return lambda: store.restore_row(1, other.snapshot_row(0))


OPERATIONS = {
    "write": lambda store: lambda: append(store, [(0, 3), (4, 20)]),
    "join": lambda store: lambda: store.join(make_store(counts=[(1, 30), (4, 0)])),
    "select": lambda store: lambda: store.select_rows(torch.tensor([0, 0, 1, 0])),
    "restore": restore_larger,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_does_not_fit_changes_nothing(name):
    """At every limit from nothing left to enough: the whole operation or none of it."""
    free = make_store()
    OPERATIONS[name](free)()
    done, pages = state(free), free.pool.num_pages - make_store().pool.num_pages
    growth = free.num_bytes() - make_store().num_bytes()
    assert pages > 0
    for left in range(0, growth + 8, 4):
        budget = ByteBudget(ROOMY)
        store, neighbour = make_store(budget), make_store(budget)
        before, beside = state(store), state(neighbour)
        budget.limit = budget.used + left
        operation = OPERATIONS[name](store)
        if left < pages * PAGE_BYTES:
            with pytest.raises(CacheFullError):
                operation()
        try:
            operation()
            assert same(done, state(store))
        except CacheFullError:
            assert left < growth
            assert same(before, state(store))
        assert same(beside, state(neighbour))


def make_ring(budget=None):
    ring = RingStore(HEADS, DIM, 5, 2, Placement(torch.float64, budget=budget), VALUE_DIM)
    ring.admit(2)
    ring["tokens"] = torch.tensor([3, 4])
    return ring


@pytest.mark.parametrize(
    "operation",
    [
        lambda ring: ring.admit(2),
        lambda ring: ring.join(make_ring()),
        lambda ring: ring.select_rows(torch.tensor([1, 0, 0, 0])),
    ],
    ids=["admit", "join", "select"],
)
def test_constant_states_keep_the_budget_too(operation):
    budget = ByteBudget(ROOMY)
    ring = make_ring(budget)
    budget.limit = budget.used + 2 * WINDOW_BYTES - 1
    before = state(ring)
    with pytest.raises(CacheFullError):
        operation(ring)
    assert same(before, state(ring)) and ring.num_rows == 2
    budget.limit += 1
    operation(ring)
    assert ring.num_rows == 4 and budget.left == 0


LENGTHS = st.lists(st.integers(0, 150), min_size=HEADS, max_size=HEADS)


@RUN
@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 20), st.integers(0, 40))
def test_what_was_announced_fits_all_stores_of_a_cache(counts, tokens, more):
    """A forward pass is checked once, before its first layer writes."""
    budget = ByteBudget(ROOMY)
    layers = [make_store(budget, [heads]) for heads in counts]
    budget.limit = budget.used + sum(store.bytes_for(tokens) for store in layers) + more * PAGE_BYTES // 8
    for store in layers:
        append(store, [(tokens, tokens)])
    assert budget.left >= 0


class PagesAlone(KVCacheLayer):
    """A layer that keeps pages and nothing else."""

    def kv_tokens(self):
        return self.stores[0].lengths


def make_cache(budget=None, lengths=((90, 70), (66, 95), (80, 81))):
    """Two rows, each of ``lengths`` in three layers that differ."""
    cache = KVCache([PagesAlone(empty_store(budget)) for _ in lengths], budget)
    cache.admit(2)
    for layer, heads in zip(cache.layers, lengths, strict=True):
        append(layer.stores[0], [heads, heads[::-1]])
    return cache


ROWS = {
    "join": lambda cache: cache.join(make_cache(lengths=[(3, 200), (120, 4), (5, 5)])),
    "select": lambda cache: cache.select_rows(torch.tensor([0, 1, 1, 0])),
    "restore": lambda cache: cache.restore_row(1, make_cache(lengths=[(99, 99), (80, 200), (130, 80)]).snapshot_row(0)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_change_in_every_layer_of_a_cache_or_in_none(name):
    """No layer may take spare pages that a later one needs."""
    roomy = make_cache()
    before = roomy.kv_bytes()
    ROWS[name](roomy)
    for left in range(0, roomy.kv_bytes() - before + 500, 50):
        budget = ByteBudget(ROOMY)
        cache = make_cache(budget)
        budget.limit = budget.used + left
        stores = [cache.layers[index].stores[0] for index in range(3)]
        states = [state(store) for store in stores]
        try:
            ROWS[name](cache)
            assert torch.equal(cache.kv_tokens(), roomy.kv_tokens())
        except CacheFullError:
            assert all(same(old, state(store)) for old, store in zip(states, stores, strict=True))
        assert budget.left >= 0
