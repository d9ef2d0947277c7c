"""What serving asks of a cache: steps that ask the device nothing, passes over some rows, pages that are reserved."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvtrain.cache.budget import ByteBudget, CacheFullError
from kvtrain.kernels.page_layout import PageLayout
from tests.cache.test_conformance import close, filled, model_of, streams
from tests.caches import POLICIES
from tests.hosts import random_ids

pytestmark = pytest.mark.usefixtures("no_grad")
QUESTIONS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at a time, what lies in other memory not counted."""

    def __init__(self, cache):
        super().__init__()
        self.others = {tensor.untyped_storage().data_ptr() for store in cache.stores for tensor in store.tensors()}
        self.made, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(result)] if isinstance(result, torch.Tensor) else []
        alive = [tensor.untyped_storage() for made in self.made if (tensor := made()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in alive}
        self.bytes = max(self.bytes, sum(size for place, size in held.items() if place not in self.others))
        return result


class Questions(TorchDispatchMode):
    """Counts how often the host asks the device what a tensor holds."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in QUESTIONS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"budget": 2**22, "preallocate": True}], ids=["grown", "reserved"])
def test_most_steps_ask_the_device_nothing_and_others_once_beside_what_they_take(method, options):
    """Three rows of different length; pages hold 4 slots or more.

    Where a policy decides what leaves, every layer asks how much that is, where it lies, and which pages are empty; and
    in the step behind it, which pages are whose, of each of its stores.
    """
    model, cache = model_of(method), None
    cache = model.make_cache(**options)
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 5 + [1] * 4])
    model(random_ids(3, 9), attention_mask=mask, past_key_values=cache)
    every = POLICIES[method].every if method in POLICIES else 0
    above, evicts = [], every > 0
    paged = sum(hasattr(store, "pool") for store in cache.stores)
    for token in random_ids(3, 12).split(1, 1):
        before, evicted = shapes(cache), evicts
        evicts = every > 0 and bool(((cache.tokens + 1) % every == 0).any())
        with Questions() as asked:
            model(token, past_key_values=cache)
        if before == shapes(cache):  # no page was taken, and no remembered input given back
            above.append(asked.count - (12 * len(cache.layers) if evicts else 2 * paged * evicted))
    assert above and max(above) <= 1


def shapes(cache):
    """Of all tensors, and how many pages are free."""
    stores = [store for layer in cache.layers for store in layer.stores]
    free = [len(store.pool.free) for store in stores if hasattr(store, "pool")]
    return [*(tensor.shape for store in stores for tensor in store.tensors()), *free]


def test_a_pass_over_some_rows_is_one_over_these_rows_alone(method):
    model, (ids, expected) = model_of(method), streams(method)
    cache = filled(model, ids[:4, :20])
    with cache.rows([3, 1]):
        assert cache.num_rows == 2 and cache.tokens.tolist() == [20, 20]
        close(model(ids[[3, 1], 20:27], past_key_values=cache).logits, expected[[3, 1], 20:27])
        close(model(ids[[3, 1], 27:28], past_key_values=cache).logits, expected[[3, 1], 27:28])
    assert cache.num_rows == 4 and cache.tokens.tolist() == [20, 28, 20, 28]
    close(model(ids[[0, 1, 2, 3], [20, 28, 20, 28]][:, None], past_key_values=cache).logits[:, 0], _next(expected))


def _next(expected):
    return torch.stack([expected[row, token] for row, token in enumerate((20, 28, 20, 28))])


def test_a_pass_that_fails_gives_the_rows_back(method):
    model, (ids, expected) = model_of(method), streams(method)
    cache = filled(model, ids[:3, :9])
    with pytest.raises(ValueError, match="the cache 2"), cache.rows([2, 0]):
        model(ids[:1, 9:12], past_key_values=cache)
    close(model(ids[:3, 9:12], past_key_values=cache).logits, expected[:3, 9:12])


def test_what_may_not_be_done_to_rows_that_are_chosen():
    model, ids = model_of("dmc"), random_ids(3, 8)
    cache = filled(model, ids)
    for rows, reason in (([], "at least one"), ([1, 1], "each once"), ([3], "no row 3"), ([-1], "no row -1")):
        with pytest.raises(ValueError, match=reason), cache.rows(rows):
            pass
    with cache.rows([0, 1]):
        for forbidden in (
            lambda: cache.admit(1),
            lambda: cache.free_rows([0]),
            lambda: cache.clear_rows([0]),
            lambda: cache.snapshot_row(0),
            cache.reset,
            lambda: cache.join(filled(model, ids)),
            lambda: cache.rows([0]).__enter__(),
        ):
            with pytest.raises(ValueError, match=r"leave cache\.rows"):
                forbidden()


def test_rows_that_are_cleared_keep_their_numbers_and_give_their_bytes_back(method):
    model, (ids, expected) = model_of(method), streams(method)
    cache = filled(model, ids[:3, :30])
    before = cache.row_bytes()
    assert int(before.sum()) == cache.held_bytes()
    cache.clear_rows([1])
    after, waiting = cache.row_bytes(), model.make_cache()
    waiting.admit(1)
    columns = sum(store.num_heads * 4 * store.rows.columns for store in cache.stores if hasattr(store, "rows"))
    assert cache.tokens.tolist() == [30, 0, 30] and int(after[1]) == waiting.held_bytes() + columns
    assert int(after.sum()) == cache.held_bytes() and bool((after <= before).all())  # the table may be narrower
    with cache.rows([1]):
        close(model(ids[4:5, :11], past_key_values=cache).logits, expected[4:5, :11])
    close(model(ids[[0, 4, 2], [30, 11, 30]][:, None], past_key_values=cache).logits[1, 0], expected[4, 11])


def test_rows_move_without_being_held_twice(method):
    model, (ids, expected) = model_of(method), streams(method)
    budget = ByteBudget(2**24)
    cache, other = model.make_cache(budget), model.make_cache(budget)
    model(ids[:1, :40], past_key_values=other)
    alone = model.make_cache()
    alone.join(other)
    largest = max(store.num_bytes() for store in alone.stores)  # without pages that are ahead
    budget.limit = budget.used + largest - 1
    with pytest.raises(CacheFullError):
        cache.join(other, move=True)
    assert other.num_rows == 1 and cache.num_rows == 0
    budget.limit += 1
    if len(other.stores) > 2:
        with pytest.raises(CacheFullError):
            cache.join(other)
    cache.join(other, move=True)
    assert other.num_rows == 0 and other.kv_bytes() == 0 and other.seen == 0
    budget.limit = 2**24
    close(model(ids[:1, 40:41], past_key_values=cache).logits, expected[:1, 40:41])


def test_a_row_is_copied_without_being_held_once_more(method):
    """In reserved memory, where nothing has to grow: besides the copy there are never more than one store's pages."""
    model, (ids, expected) = model_of(method), streams(method)
    cache = model.make_cache(2**24, preallocate=True)
    model(ids[:3, :40], past_key_values=cache)
    with cache.rows([1]):
        model(ids[1:2, 40:44], past_key_values=cache)
    row, largest = int(cache.row_bytes()[1]), max(int(store.row_bytes()[1]) for store in cache.stores)
    with Peak(cache) as peak:
        cache.copy_row(1, 2)
    assert peak.bytes <= largest < row
    close(model(ids[[0, 1, 1], [40, 44, 44]][:, None], past_key_values=cache).logits[1:, 0], expected[[1, 1], 44])


def test_a_copy_of_a_row_keeps_to_the_budget_and_is_refused_before_anything_changes(method):
    model, (ids, expected) = model_of(method), streams(method)
    budget = ByteBudget(2**24)
    cache = model.make_cache(budget)
    cache.admit(2)
    with cache.rows([1]):
        model(ids[:1, :30], past_key_values=cache)
    wanted = sum(store.bytes_to_copy(1, 0) for store in cache.stores)
    assert wanted or "transnormer" in method
    budget.limit = budget.used + wanted - 1
    if wanted:
        with pytest.raises(CacheFullError, match="a copied row may take"):
            cache.copy_row(1, 0)
    assert cache.tokens.tolist() == [0, 30] and budget.used <= budget.limit + 1
    budget.limit += 1
    cache.copy_row(1, 0)
    assert budget.used == cache.kv_bytes() <= budget.limit and cache.tokens.tolist() == [30, 30]
    before = cache.kv_bytes()
    cache.copy_row(1, 1)
    with pytest.raises(ValueError, match="no row 2"):
        cache.copy_row(2, 1)
    assert cache.kv_bytes() == before
    budget.limit = 2**24
    close(model(ids[:1, 30:31].expand(2, -1), past_key_values=cache).logits, expected[[0, 0], 30:31])


def test_snapshots_say_their_bytes_and_lie_where_they_are_put(method):
    model, (ids, expected) = model_of(method), streams(method)
    cache = filled(model, ids[:2, :20])
    snapshot = cache.snapshot_row(1).to("cpu")
    tables = sum(4 * store["owned"].numel() - store["owned"].nbytes for store in snapshot.stores if "owned" in store)
    assert snapshot.num_bytes() + tables == int(cache.row_bytes()[1])
    cache.clear_rows([0])
    cache.restore_row(0, snapshot)
    close(model(ids[[1, 1], 20:21], past_key_values=cache).logits, expected[[1, 1], 20:21])


def test_reserved_pages_are_taken_once_and_counted_as_rows_come():
    model, ids = model_of("dmc"), random_ids(4, 60)
    with pytest.raises(ValueError, match="give make_cache a budget"):
        model.make_cache(preallocate=True)
    cache = model.make_cache(2**20, preallocate=True)
    memory = [cache.layers[0].pages.pool._memory["keys"].data_ptr()]
    assert cache.kv_bytes() == 0 and cache.reserved_bytes() > 0
    for part in ids.split(7, 1):
        model(part, past_key_values=cache)
    grown = model.make_cache()
    for part in ids.split(7, 1):
        model(part, past_key_values=grown)
    assert cache.held_bytes() == grown.held_bytes() and cache.free_bytes() == 0
    cache.free_rows([0, 2])
    slots = cache.layers[0].pages.pool.slots["keys"]
    assert cache.free_bytes() == 0 and [slots.data_ptr()] == memory
    with pytest.raises(CacheFullError):
        model(random_ids(2, 20_000), past_key_values=cache)


@pytest.mark.parametrize("copies", [False, True])
def test_a_layout_reads_the_pages_of_its_rows_alone(copies):
    """However large the pool is that they lie in."""
    table = torch.tensor([[5, 2], [7, -1]], dtype=torch.int)
    layout = PageLayout(table, 8 if not copies else 5 * 10**6, page_size=4)
    assert (layout.pages is not None) and layout.pages.tolist() == [5, 2, 7]
    hidden = layout.shown(torch.tensor([6, 3])).hidden.slots
    assert hidden.tolist() == [[False] * 4, [False, False, True, True], [False, False, False, True]]
