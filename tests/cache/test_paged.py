"""The paged store: rows against a list of slots, pages against their owners, bytes against what was announced."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement

from .test_state import RUN, RowMachine

HEADS, DIM, VALUE_DIM = 2, 3, 2
DIMS = {"keys": DIM, "values": VALUE_DIM}
DOUBLE = Placement(torch.float64)


class PagedMachine(RowMachine):
    """A row is a list of numbers a head: what its slots hold."""

    def configure(self, data):
        self.page_size = data.draw(st.integers(1, 5))

    def make_store(self):
        return PagedStore(HEADS, DIMS, self.page_size, DOUBLE)

    def empty_row(self):
        return [[] for _ in range(HEADS)]

    def write(self, store, rows, data):
        """Every head keeps some of the entries; the first of them may replace its last slot."""
        length = data.draw(st.sampled_from([1, 4, 11]))
        count = len(rows) * HEADS
        masks = data.draw(st.lists(st.integers(0, 2 ** (length + 1) - 1), min_size=count, max_size=count))
        keep = torch.tensor(masks, dtype=torch.long).reshape(-1, HEADS, 1) >> torch.arange(length) & 1 > 0
        replaces = torch.tensor(masks, dtype=torch.long).reshape(-1, HEADS) >> length & 1 > 0
        slots = store.lengths - (replaces & (store.lengths > 0)).long()
        numbers = self.clock + 1 + torch.arange(keep.numel(), dtype=torch.float64).reshape(keep.shape)
        self.clock += keep.numel()
        for row, heads in enumerate(rows):
            for head, held in enumerate(heads):
                new = numbers[row, head][keep[row, head]].tolist()
                held[int(slots[row, head]) :] = new or held[int(slots[row, head]) :]
        store.write(entries(numbers), slots.unsqueeze(-1) + keep.cumsum(-1) - 1, keep)

    def check_row(self, store, row, expected):
        assert store.lengths[row].tolist() == [len(held) for held in expected]
        for head, held in enumerate(expected):
            expected_slots = entries(torch.tensor(held, dtype=torch.float64))
            found = store.gather_row(row, head)
            assert found.keys() == expected_slots.keys()
            assert all(torch.equal(found[name], slots) for name, slots in expected_slots.items())

    def check(self, store, rows):
        super().check(store, rows)
        check_pages(store)


def entries(numbers):
    """Keys ``(..., n, D)`` and values of which no two numbers are alike."""
    keys = numbers[..., None] + torch.arange(DIM, dtype=torch.float64) / DIM
    return {"keys": keys, "values": -keys[..., :VALUE_DIM]}


def check_pages(store):
    """Every page has one owner or is free, nobody owns more than it needs, and there are no more than promised."""
    pool, owned, needed = store.pool, store.table >= 0, -(-store.lengths // store.page_size)
    pages = store.table[owned].tolist()
    assert sorted(pages + pool.free) == list(range(pool.num_pages))
    assert torch.equal(owned, torch.arange(store.table.shape[2]) < needed.unsqueeze(-1))
    assert store.table.shape[2] == (int(needed.max()) if needed.numel() else 0)
    assert pool.num_pages <= int(store.lengths.sum()) // store.page_size + store.num_rows * HEADS
    assert store.free_bytes() == len(pool.free) * pool.page_bytes
    assert all(slots.isfinite().all() for slots in pool.tensors())


PagedMachine.TestCase.settings = RUN
TestPagedStore = PagedMachine.TestCase


def append(store, counts):
    """Ones for the next ``counts (B, H)`` slots of every head."""
    counts = torch.as_tensor(counts)
    keep = torch.arange(max(1, int(counts.max()))) < counts.unsqueeze(-1)
    store.write(
        entries(torch.ones(keep.shape, dtype=torch.float64)), store.lengths.unsqueeze(-1) + keep.cumsum(-1) - 1, keep
    )


def grown(page_size, steps):
    """A store of two rows with a history of appends."""
    store = PagedStore(HEADS, DIMS, page_size, DOUBLE)
    store.admit(2)
    for counts in steps:
        append(store, counts)
    return store


COUNTS = st.lists(st.lists(st.integers(0, 40), min_size=HEADS, max_size=HEADS), min_size=2, max_size=2)


@RUN
@given(st.integers(1, 6), st.lists(COUNTS, max_size=4), st.integers(0, 2), st.integers(1, 40), st.data())
def test_no_write_takes_more_than_was_announced(page_size, steps, rows, tokens, data):
    store = grown(page_size, steps)
    promised, before = store.bytes_for(tokens, rows), store.num_bytes()
    store.admit(rows)
    count = (2 + rows) * HEADS
    counts = data.draw(st.lists(st.integers(0, tokens), min_size=count, max_size=count))
    append(store, torch.tensor(counts).reshape(-1, HEADS))
    assert store.num_bytes() - before <= promised


@RUN
@given(st.integers(1, 6), st.lists(COUNTS, max_size=4), st.integers(0, 2), st.integers(1, 40))
def test_the_announcement_is_what_a_store_that_keeps_everything_takes(page_size, steps, rows, tokens):
    """But for the spare pages of one growth."""
    store = grown(page_size, steps)
    most_spare = store.pool.num_pages // 16 * store.pool.page_bytes
    promised, before = store.bytes_for(tokens, rows), store.num_bytes()
    store.admit(rows)
    append(store, torch.full((2 + rows, HEADS), tokens))
    assert 0 <= promised - (store.num_bytes() - before) <= most_spare


def test_bytes_by_hand():
    store = grown(16, [[[40, 40], [40, 5]]])
    pages = 3 + 3 + 3 + 1
    assert store.pool.slots["keys"].shape == (pages, 16, DIM) and store.pool.slots["values"].shape == (
        pages,
        16,
        VALUE_DIM,
    )
    assert store.free_bytes() == 0
    assert store.num_bytes() == pages * 16 * (DIM + VALUE_DIM) * 8 + 4 * (8 + 3 * 4)
    assert store.bytes_for(8) == 0
    assert store.bytes_for(9) == 3 * store.pool.page_bytes + 4 * 4
    assert store.bytes_for(0, rows=1) == 2 * (8 + 3 * 4)
    assert store.bytes_for(1, rows=1) == 2 * (8 + 3 * 4) + 2 * store.pool.page_bytes


def test_dropped_rows_give_pages_and_columns_back():
    store = grown(4, [[[400, 3], [5, 2]]])
    assert store.pool.num_pages == 100 + 1 + 2 + 1 and store.table.shape == (2, HEADS, 100)
    store.select_rows(torch.tensor([1]))
    assert store.table.shape == (1, HEADS, 2)
    assert store.pool.num_pages == 3
    check_pages(store)


def test_gradients_and_precision_stay_outside():
    store = PagedStore(1, {"keys": DIM, "values": DIM}, 4, Placement(torch.bfloat16))
    store.admit(1)
    keys = torch.full((1, 1, 2, DIM), 1 + 2**-9, requires_grad=True)
    store.write({"keys": keys, "values": keys * 2}, torch.tensor([[[0, 1]]]), torch.tensor([[[True, True]]]))
    found = store.gather_row(0, 0)
    assert found["keys"].dtype == torch.bfloat16 and found["keys"].eq(1).all() and found["values"].eq(2).all()
    assert not any(tensor.requires_grad for tensor in store.tensors())


def test_rows_join_from_another_precision():
    store, other = PagedStore(HEADS, DIMS, 4, Placement(torch.float32)), grown(4, [[[3, 0], [6, 2]]])
    store.join(other)
    assert store.pool.slots["keys"].dtype == store.pool.slots["values"].dtype == torch.float32
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        theirs = other.gather_row(row, head)
        assert all(torch.equal(mine, theirs[name].float()) for name, mine in store.gather_row(row, head).items())


def test_one_page_holds_several_layers():
    """What is not named in a write stays as it is, and everything moves together."""
    dims = {"keys.0": 3, "values.0": 2, "keys.4": 3}
    store = PagedStore(1, dims, 2, DOUBLE)
    store.admit(2)
    keep, slots = torch.ones(2, 1, 3, dtype=torch.bool), torch.arange(3).expand(2, 1, 3)
    for number, (name, dim) in enumerate(dims.items(), 1):
        store.write({name: torch.full((2, 1, 3, dim), float(number))}, slots, keep)
    assert store.lengths.tolist() == [[3], [3]] and store.pool.page_bytes == 2 * 8 * 8
    store.select_rows(torch.tensor([1, 1, 1]))
    for row in range(3):
        found = store.gather_row(row, 0)
        assert all(found[name].eq(number).all() for number, name in enumerate(dims, 1))
    check_pages(store)


@pytest.mark.parametrize("page_size", [0, -4])
def test_page_size_is_validated(page_size):
    with pytest.raises(ValueError, match=f"page_size must be at least 1, not {page_size}"):
        PagedStore(HEADS, DIMS, page_size)
