"""A paged store with fields beside its slots, out of which any slots may be evicted: against dictionaries of tokens."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from kvtrain.cache.budget import ByteBudget
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.kernels.quantization import dequantize, quantize

from .test_serving import Questions
from .test_state import RowMachine

HEADS = 2
DIMS = {"keys": 4, "values": 2}
FIELDS = {"position": torch.int32, "mass": torch.float32, "total": torch.float64}
SLOT_BYTES = 4 + 4 + 8
ROOMY = 1 << 20


def states_of(numbers):
    """Keys ``(..., n, D)`` and values, what 4 bits can hold in float64."""
    keys = numbers[..., None] + torch.tensor([0.0, 0.25, 0.5, 3.0], dtype=torch.float64)
    return {"keys": keys, "values": -keys[..., :2]}


def fields_of(numbers):
    """Scalars that bfloat16 cannot hold, nor float32 the last one."""
    return {"position": numbers.long(), "mass": (numbers / 3).float(), "total": numbers / 3}


class EvictingMachine(RowMachine):
    """A row is a dictionary a head: the position of each token, and what its slot holds besides.

    Which slot a token has is the store's business; its position says who it is.
    """

    reserved = False

    def configure(self, data):
        self.page_size = data.draw(st.integers(1, 5))
        self.dtype, self.bits = data.draw(st.sampled_from([torch.float64, torch.bfloat16])), None

    def make_store(self):
        placement = Placement(self.dtype)
        if self.reserved:
            placement = Placement(self.dtype, budget=ByteBudget(8 * ROOMY), reserve=ROOMY)
        return PagedStore(HEADS, DIMS, self.page_size, placement, self.bits, slot_fields=FIELDS)

    def empty_row(self):
        return [{} for _ in range(HEADS)]

    def write(self, store, rows, data):
        """Several entries, of which every head keeps some; the first may replace its last slot."""
        shape = (len(rows), HEADS, data.draw(st.sampled_from([1, 3, 9])))
        random = self.random(data)
        keep = torch.rand(shape, generator=random) < data.draw(st.sampled_from([0.4, 1.0]))
        replaces = (torch.rand(shape[:2], generator=random) < 0.3) & (store.lengths > 0)
        slots = (store.lengths - replaces.long()).unsqueeze(-1) + keep.cumsum(-1) - 1
        self.put(store, rows, slots, keep, data)

    def put(self, store, rows, slots, keep, data):
        """Write with some of the fields, and to the model: the others stay, and are 0 where there was nothing."""
        numbers = self.clock + 1 + torch.arange(slots.numel(), dtype=torch.float64).reshape(slots.shape)
        self.clock += slots.numel()
        named = {"position", *data.draw(st.sets(st.sampled_from(["mass", "total"])))}
        fields = {name: values for name, values in fields_of(numbers).items() if name in named}
        before, lengths = store.field("position").tolist(), store.lengths.tolist()
        store.write({**states_of(numbers), **fields}, slots, keep)
        kept = torch.ones_like(slots, dtype=torch.bool) if keep is None else keep
        for row, head, entry in kept.nonzero().tolist():
            slot, held = int(slots[row, head, entry]), rows[row][head]
            token = {"mass": 0.0, "total": 0.0}
            if slot < lengths[row][head]:
                token = held.pop(before[row][head][slot])
            token |= {name: values[row, head, entry].item() for name, values in fields.items()}
            held[token["position"]] = token

    def step(self, store, rows, data):
        """A token of every row, as a decoding step writes it."""
        question = store.ask_ahead()
        if question is not None:
            store.take_ahead(question.tolist())
        self.put(store, rows, store.lengths.unsqueeze(-1), None, data)

    def evict(self, store, rows, data):
        """Any slots, marked in use or not."""
        share = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
        victims = torch.rand(store.live().shape, generator=self.random(data)) < share
        gone, kept = (victims & store.live()).tolist(), store.lengths - (victims & store.live()).sum(-1)
        positions = store.field("position").tolist()
        store.evict(victims)
        assert torch.equal(store.lengths, kept)
        for heads, marks, where in zip(rows, gone, positions, strict=True):
            for held, mine, slots in zip(heads, marks, where, strict=True):
                for position in [position for mark, position in zip(mine, slots, strict=True) if mark]:
                    del held[position]

    def truncate(self, store, rows, data):
        lengths = (torch.rand(store.lengths.shape, generator=self.random(data)) * (store.lengths + 1)).long()
        positions = store.field("position").tolist()
        store.truncate(torch.minimum(lengths, store.lengths))
        for heads, left, where in zip(rows, store.lengths.tolist(), positions, strict=True):
            for head, held in enumerate(heads):
                heads[head] = {position: held[position] for position in where[head][: left[head]]}

    def set_field(self, store, rows, data):
        """What is written to slots that are not in use is not kept."""
        store.set_field("mass", torch.where(store.live(), store.field("mass") + 1, torch.nan))
        for held in (held for heads in rows for held in heads):
            for token in held.values():
                token["mass"] = (torch.tensor(token["mass"], dtype=torch.float32) + 1).item()

    def random(self, data):
        return torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))

    def change(self, store, rows, data):
        operation = data.draw(st.sampled_from([self.write, self.step, self.evict, self.truncate, self.set_field]))
        operation(store, rows, data)

    @rule(data=st.data())
    def evict_slots(self, data):
        self.evict(self.store, self.rows, data)

    @rule(data=st.data())
    def decode(self, data):
        """Steps, each of them with an eviction."""
        for _ in range(3):
            self.step(self.store, self.rows, data)
            self.evict(self.store, self.rows, data)

    @rule(data=st.data())
    def change_rows(self, data):
        self.change(self.store, self.rows, data)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def change_some_rows(self, data):
        """Those that are chosen, and nothing happens to the others."""
        chosen = data.draw(st.permutations(range(len(self.rows))))[: data.draw(st.integers(1, len(self.rows)))]
        rows = [self.rows[row] for row in chosen]
        self.store.narrow(torch.tensor(chosen))
        for _ in range(2):
            self.change(self.store, rows, data)
            assert self.store.num_rows == len(rows)
            for row, expected in enumerate(rows):
                self.check_row(self.store, row, expected)
        self.store.widen()
        for row, heads in zip(chosen, rows, strict=True):
            self.rows[row] = heads

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def clear_row(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.store.clear_rows(torch.tensor([row]))
        self.rows[row] = self.empty_row()

    def check(self, store, rows):
        assert store.num_rows == len(rows)
        for row, expected in enumerate(rows):
            self.check_row(store, row, expected)
        check_pages(store)

    def check_row(self, store, row, expected):
        assert store.lengths[row].tolist() == [len(held) for held in expected]
        for head, held in enumerate(expected):
            found, positions = store.gather_row(row, head), sorted(held)
            order = found["position"].argsort()
            assert found["position"][order].tolist() == positions
            for name in ("mass", "total"):
                assert found[name].dtype == FIELDS[name]
                assert found[name][order].tolist() == [held[position][name] for position in positions]
            for name, states in states_of(torch.tensor(positions, dtype=torch.float64)).items():
                assert torch.equal(found[name][order], self.stored(states))

    def stored(self, states):
        """What comes out of pages into which these were written once."""
        if self.bits is None:
            return states.to(self.dtype)
        return dequantize(quantize(states, self.bits), self.bits, states.shape[-1], self.dtype)


def check_pages(store):
    """Every page has one owner or is free; a head has those of its slots, and at most that of its next one besides."""
    pool, owned, size = store.pool, (store.table >= 0).sum(2), store.page_size
    assert sorted([*store.table[store.table >= 0].tolist(), *pool.free.tolist()]) == list(range(pool.num_pages))
    assert bool((owned >= -(-store.lengths // size)).all()) and bool((owned <= store.lengths // size + 1).all())
    assert store.table.shape[2] >= (int(owned.max()) if owned.numel() else 0)
    assert pool.num_pages <= int(store.lengths.sum()) // size + store.num_rows * HEADS
    widths = {8: 4 + 4 + 2 + 4, 4: 2 + 4 + 1 + 4, None: 6 * store.placement.dtype.itemsize}
    assert pool.page_bytes == size * (widths[store.bits] + SLOT_BYTES)
    assert store.num_bytes() == pool.num_pages * pool.page_bytes + sum(t.nbytes for t in (store.lengths, store.table))
    live = store.live()
    assert torch.equal(live.sum(-1), store.lengths)
    for name in FIELDS:
        assert store.field(name).shape == live.shape and not store.field(name)[~live].any()


class QuantizedEvictingMachine(EvictingMachine):
    """Bytes of keys and values move beside fields that are kept as they are."""

    def configure(self, data):
        super().configure(data)
        self.dtype, self.bits = torch.float64, data.draw(st.sampled_from([8, 4]))


class ReservedEvictingMachine(EvictingMachine):
    """Pages are reserved, and hold what they held before they were taken."""

    reserved = True

    def step(self, store, rows, data):
        """Also where shapes are fixed for it."""
        if not rows or data.draw(st.booleans()):
            super().step(store, rows, data)
            return
        question = store.ask_ahead()
        if question is not None:
            store.take_ahead(question.tolist())
        with store.fixed(store.pages_to_list()):
            self.put(store, rows, store.lengths.unsqueeze(-1), None, data)


for machine in (EvictingMachine, QuantizedEvictingMachine, ReservedEvictingMachine):
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=12)
TestEvictingStore = EvictingMachine.TestCase
TestQuantizedEvictingStore = QuantizedEvictingMachine.TestCase
TestReservedEvictingStore = ReservedEvictingMachine.TestCase


def filled(lengths, page_size=4, **options):
    """Rows of heads with ``lengths (B, H)``, whose tokens have the numbers of their slots."""
    lengths = torch.tensor(lengths)
    store = PagedStore(
        lengths.shape[1], DIMS, page_size, Placement(torch.float64), **{"slot_fields": FIELDS, **options}
    )
    store.admit(len(lengths))
    slots = torch.arange(int(lengths.max())).expand(*lengths.shape, -1)
    numbers = slots.double()
    entries = {**states_of(numbers), **(fields_of(numbers) if store.slot_fields else {})}
    store.write(entries, slots, slots < lengths.unsqueeze(-1))
    return store


def marked(store, *slots):
    """Marks of these ``(row, head, slot)``."""
    victims = torch.zeros_like(store.live())
    for row, head, slot in slots:
        victims[row, head, slot] = True
    return victims


def test_only_the_last_slots_move_and_no_more_of_them_than_there_are_holes():
    store = filled([[10, 3], [5, 0]])
    store.evict(marked(store, (0, 0, 1), (0, 0, 4), (0, 0, 8), (1, 0, 4), (1, 1, 2)))
    assert store.lengths.tolist() == [[7, 3], [4, 0]]
    assert store.gather_row(0, 0)["position"].tolist() == [0, 7, 2, 3, 9, 5, 6]
    assert store.gather_row(0, 0)["keys"][:, 0].tolist() == [0, 7, 2, 3, 9, 5, 6]
    assert store.gather_row(0, 1)["position"].tolist() == [0, 1, 2]
    assert store.gather_row(1, 0)["position"].tolist() == [0, 1, 2, 3]
    assert (store.table >= 0).sum(2).tolist() == [[2, 1], [2, 0]]  # the third head keeps the page of its next slot
    pages = torch.tensor([3, 2])
    assert store.row_bytes().tolist() == (pages * store.pool.page_bytes + 2 * (8 + 2 * 4)).tolist()
    assert store.num_bytes() == store.row_bytes().sum() + store.free_bytes()


def test_a_head_that_loses_all_gives_its_pages_back():
    store = filled([[40, 7]])
    store.evict(torch.ones_like(store.live()))
    assert store.lengths.tolist() == [[0, 0]] and store.pool.num_pages == 2
    assert store.table.shape == (1, 2, 1)  # the pages of their next slots
    store.select_rows(torch.tensor([0]))
    assert store.table.shape == (1, 2, 0) and store.free_bytes() == store.pool.num_bytes()
    assert store.field("mass").shape == (1, 2, 0)


def test_bytes_of_a_slot_by_hand():
    """Fields have the dtypes that they were given, beside bytes as beside bfloat16."""
    for bits, width in ((None, 6 * 8), (8, 4 + 4 + 2 + 4), (4, 2 + 4 + 1 + 4)):
        store = filled([[10]], bits=bits)
        assert store.pool.page_bytes == 4 * (width + SLOT_BYTES)
        assert store.num_bytes() == 3 * store.pool.page_bytes + 8 + 3 * 4
        assert store.bytes_for(3) == store.pool.page_bytes + 4
        assert [store.pool.slots[name].dtype for name in FIELDS] == list(FIELDS.values())
        assert store.gather("total", torch.tensor([[7, 2]])).tolist() == [[[7 / 3, 2 / 3]]]


def test_a_head_that_gains_and_loses_a_slot_in_turn_leaves_the_table_alone():
    """Also where its slots fill their pages: nothing is taken, given back, or asked but once in a page of steps."""
    for held in (32, 30):
        store = filled([[held, held]] * 2, page_size=8, max_slots=held + 1)
        asked, tables = 0, None
        for step in range(40):
            question = store.ask_ahead()
            if question is not None:
                store.take_ahead(question.tolist())
            tables = tables if step else store.rows.pages
            asked += question is not None
            store.write(states_of(torch.full((2, 2, 1), float(step))), store.lengths.unsqueeze(-1))
            with Questions() as questions:
                store.evict(marked(store, *((row, head, 3 + step % 7) for row in range(2) for head in range(2))))
            assert questions.count <= 2 and store.rows.pages is tables
            assert store.lengths.tolist() == [[held, held]] * 2
        assert asked <= 40 // (7 if held == 32 else 2) + 1


def test_a_page_that_is_kept_for_the_next_slot_stays_behind_when_rows_move():
    """What was announced for a copied row does not count it, and it is not copied."""
    store = filled([[9, 9]], page_size=8)
    store.evict(marked(store, (0, 0, 2), (0, 1, 5)))
    assert (store.table >= 0).sum(2).tolist() == [[2, 2]]
    promised, before = store.bytes_to_select(torch.tensor([0, 0])), store.num_bytes()
    store.select_rows(torch.tensor([0, 0]))
    assert (store.table >= 0).sum(2).tolist() == [[1, 1], [1, 1]]
    assert store.num_bytes() - before <= promised


def test_a_slot_that_is_written_again_after_an_eviction_is_in_use_again():
    store, slots = filled([[3, 3]]), torch.full((1, 2, 1), 3)
    for number in (7.0, 8.0):
        store.take_ahead(store.ask_ahead().tolist())
        store.write({**states_of(slots * 0 + number), **fields_of(slots * 0 + number)}, slots)
        assert store.lengths.tolist() == [[4, 4]]
        store.evict(marked(store, (0, 0, 1), (0, 1, 1)))
    assert store.gather_row(0, 1)["position"].tolist() == [0, 8, 2]


class Moved(TorchDispatchMode):
    """Counts elements that are copied into pages, and operators."""

    def __init__(self):
        super().__init__()
        self.elements = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        self.elements += args[3].numel() if func is torch.ops.aten.index_copy_.default else 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("held", [9, 901])
def test_what_an_eviction_moves_depends_on_victims_alone(held):
    store = filled([[held] * 2] * 3, page_size=8)
    victims = marked(store, (0, 0, 1), (2, 1, 3))
    with Moved() as moved:
        store.evict(victims)
    assert moved.elements == 2 * (sum(DIMS.values()) + len(FIELDS))
    assert moved.operators <= 50


def test_a_budget_admits_rows_by_what_they_come_to_between_evictions():
    """100 tokens of a store that never keeps more than 10 slots a head fit into what was announced for them."""

    def make(**options):
        return PagedStore(HEADS, DIMS, 4, slot_fields=FIELDS, max_slots=10, **options)

    announced = make().bytes_for(100, rows=3)
    assert announced == make().bytes_for(10, rows=3) == 3 * HEADS * (3 * 4 * (6 * 4 + SLOT_BYTES) + 8 + 3 * 4)
    store = make(placement=Placement(budget=ByteBudget(announced)))
    store.admit(3)
    for step in range(100):
        numbers = torch.full((3, HEADS, 1), float(step), dtype=torch.float64)
        store.append({**states_of(numbers), **fields_of(numbers)}, torch.ones(3, 1, dtype=torch.bool))
        if step % 3 == 0:
            store.evict(store.live() & (store.lengths > 7).unsqueeze(-1) & (store.field("position") < step - 6))
        assert store.bytes_for(100) + store.num_bytes() == announced
    assert store.lengths.max() <= 10


def test_a_slot_that_is_overwritten_keeps_the_fields_that_are_not_named():
    store = filled([[3, 3]])
    slots = store.lengths.unsqueeze(-1) - 1
    store.write(states_of(torch.full((1, 2, 1), 9.0)), slots)
    assert store.gather_row(0, 1)["keys"][2, 0] == 9 and store.gather_row(0, 1)["position"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["keys", "owned"])
def test_names_of_fields_are_validated(name):
    with pytest.raises(ValueError, match=f"a slot field cannot be called '{name}': the name is taken"):
        PagedStore(HEADS, DIMS, slot_fields={name: torch.float32})


@pytest.mark.parametrize("fields", [{}, {"mass": torch.float32}, {**FIELDS, "more": torch.int32}])
def test_pages_with_other_fields_are_refused_before_anything_changes(fields):
    store, other = filled([[5, 2]]), PagedStore(HEADS, DIMS, 4, Placement(torch.float64), slot_fields=fields)
    other.admit(1)
    before = [tensor.clone() for tensor in store.tensors()]
    for change in (lambda: store.join(other), lambda: store.restore_row(0, other.snapshot_row(0))):
        with pytest.raises(ValueError, match="do not fit a cache of keys, mass, position, total, values: give both"):
            change()
    assert all(torch.equal(old, new) for old, new in zip(before, store.tensors(), strict=True))
