"""The paged store: rows against a list of slots, pages against their owners, bytes against what was announced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.cache.budget import ByteBudget, CacheFullError
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.kernels.quantization import dequantize, quantize

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
        store.write(self.written(numbers), slots.unsqueeze(-1) + keep.cumsum(-1) - 1, keep)

    def written(self, numbers):
        return entries(numbers)

    def held(self, numbers):
        return entries(numbers)

    def check_row(self, store, row, expected):
        assert store.lengths[row].tolist() == [len(held) for held in expected]
        for head, held in enumerate(expected):
            expected_slots = self.held(torch.tensor(held, dtype=torch.float64))
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
    assert sorted(pages + pool.free.tolist()) == list(range(pool.num_pages))
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


def packed_once(states, bits, dtype=torch.float64, group=None):
    return dequantize(quantize(states, bits, group), bits, states.shape[-1], dtype, group)


def even_entries(numbers):
    """As ``entries``, four channels each: what 2 bits can hold."""
    keys = numbers[..., None] + torch.tensor([0.0, 0.25, 0.5, 3.0], dtype=torch.float64)
    return {"keys": keys, "values": -keys.flip(-1)}


class QuantisedMachine(PagedMachine):
    """Rows come, move and go as bytes: what comes out is what went in, packed once and never again."""

    def configure(self, data):
        super().configure(data)
        self.bits, self.group = data.draw(st.sampled_from([8, 4, 2])), data.draw(st.sampled_from([None, 2]))

    def make_store(self):
        return PagedStore(HEADS, {"keys": 4, "values": 4}, self.page_size, DOUBLE, self.bits, group=self.group)

    def written(self, numbers):
        return even_entries(numbers)

    def held(self, numbers):
        return {
            name: packed_once(states, self.bits, group=self.group) for name, states in even_entries(numbers).items()
        }


QuantisedMachine.TestCase.settings = settings(RUN, max_examples=20, stateful_step_count=15)
TestQuantisedStore = QuantisedMachine.TestCase


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_bytes_by_hand(bits):
    """Codes and four bytes a vector, whatever the dtype; what was announced is what is taken."""
    dims, slot = {"keys": 6, "values": 2}, {8: 6 + 4 + 2 + 4, 4: 3 + 4 + 1 + 4}[bits]
    for dtype in (torch.float64, torch.bfloat16):
        store = PagedStore(HEADS, dims, 16, Placement(dtype), bits)
        promised = store.bytes_for(40, rows=2)
        store.admit(2)
        states = {name: torch.ones(2, HEADS, 40, dim, dtype=dtype) for name, dim in dims.items()}
        store.append(states, torch.ones(2, 40, dtype=torch.bool))
        pages = 2 * HEADS * 3
        assert store.pool.page_bytes == 16 * slot
        assert store.num_bytes() == promised == pages * 16 * slot + 2 * HEADS * (8 + 3 * 4)
        assert store.bytes_for(8) == 0 and store.bytes_for(9) == 2 * HEADS * (16 * slot + 4)
        assert {tensor.dtype for tensor in store.pool.tensors()} == {torch.uint8}


def test_a_budget_counts_quantized_bytes():
    """What holds 16 tokens in float64 holds 59 in 8 bits, a page and a number in the table for each."""
    token, held = {"keys": torch.ones(1, 1, 1, 6)}, torch.ones(1, 1, dtype=torch.bool)
    limit = 8 + 16 * (6 * 8 + 4)
    for bits, tokens in ((None, 16), (8, (limit - 8) // (6 + 4 + 4))):
        store = PagedStore(1, {"keys": 6}, 1, Placement(torch.float64, budget=ByteBudget(limit)), bits)
        store.admit(1)
        for _ in range(tokens):
            store.append(token, held)
        with pytest.raises(CacheFullError):
            store.append(token, held)
        assert store.lengths.item() == tokens


def test_slots_of_quantized_pages_come_out_in_the_placements_dtype():
    store = PagedStore(HEADS, {"keys": 3}, 4, Placement(torch.bfloat16), 8)
    store.admit(2)
    states = torch.randn(2, HEADS, 9, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    store.append({"keys": states}, torch.ones(2, 9, dtype=torch.bool))
    expected = packed_once(states.detach(), 8, torch.bfloat16)
    slots = torch.tensor([[8, 0, 3], [5, 5, 1]])
    found = store.gather("keys", slots)
    assert found.dtype == torch.bfloat16 and not found.requires_grad
    assert torch.equal(found, torch.stack([expected[row][:, slots[row]] for row in range(2)]))
    assert torch.equal(store.gather("keys", slots, slice(1, None)), found[:, 1:])
    assert torch.equal(store.gather_row(1, 0)["keys"], expected[1, 0])


@pytest.mark.parametrize("bits", [(8, None), (None, 4), (4, None), (8, 4)])
def test_pages_of_another_form_are_refused_before_anything_changes(bits):
    """Also where a packed vector of 4 bits has as many bytes as a plain one has channels."""
    store, other = (PagedStore(1, {"keys": 8}, 4, DOUBLE, form) for form in bits)
    for part in (store, other):
        part.admit(1)
        part.append({"keys": torch.ones(1, 1, 3, 8)}, torch.ones(1, 3, dtype=torch.bool))
    before = [tensor.clone() for tensor in store.tensors()]
    for change in (lambda: store.join(other), lambda: store.restore_row(0, other.snapshot_row(0))):
        with pytest.raises(ValueError, match=r"do not fit a cache of .*: give both caches the same model, page size"):
            change()
    assert all(torch.equal(old, new) for old, new in zip(before, store.tensors(), strict=True))


@pytest.mark.parametrize(
    ("dims", "bits", "message"), [({"keys": 8}, 3, "must be 2, 4 or 8"), ({"keys": 7}, 4, "is no multiple")]
)
def test_bits_are_validated(dims, bits, message):
    with pytest.raises(ValueError, match=message):
        PagedStore(HEADS, dims, bits=bits)


@pytest.mark.parametrize(("unbounded", "columns"), [(0, 2), (1, 25)])
def test_heads_of_a_known_size_are_announced_no_larger(unbounded, columns):
    """Of 100 tokens a bounded head keeps 6 at most: 2 pages of 4, which a step then no longer asks for."""
    store = PagedStore(HEADS, DIMS, 4, DOUBLE, max_slots=6, num_unbounded=unbounded)
    pages = 25 * unbounded + 2 * (HEADS - unbounded)
    table = HEADS * (8 + 4 * columns)
    assert store.bytes_for(100, rows=3) == 3 * (pages * store.pool.page_bytes + table)
    store.admit(1)
    append(store, [[100 if head < unbounded else 6 for head in range(HEADS)]])
    assert store.bytes_for(0) == 0
    answer = store.ask_ahead().tolist()
    assert answer[0] == unbounded and (answer[1] > 10**9) == (not unbounded)
    assert store.bytes_for(4) == unbounded * (2 * store.pool.page_bytes + 4 * HEADS)  # one of them may be spare


def test_max_slots_is_validated():
    with pytest.raises(ValueError, match="max_slots must be at least 1, not 0"):
        PagedStore(HEADS, DIMS, max_slots=0)
