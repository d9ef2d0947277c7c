"""Constant state a row; and the machine that the rows of every store go through."""

import copy
import functools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from kvtrain.cache.rows import Placement
from kvtrain.cache.state import StateStore

from .test_conformance import reachable_bytes

MOST_ROWS = 6
RUN = settings(max_examples=80, stateful_step_count=20)


class RowMachine(RuleBasedStateMachine):
    """Rows are admitted, written, copied, joined, dropped and put back, in a store and in a list beside it.

    Subclasses say what a store is, and how a row of it is written and compared with its model.
    """

    reserve = None  # bytes that every store's placement reserves

    def configure(self, data):
        """Draw what all stores of this run share."""

    def make_store(self):
        raise NotImplementedError

    def empty_row(self):
        raise NotImplementedError

    def write(self, store, rows, data):
        """Write to every row, and to its model in ``rows``."""
        raise NotImplementedError

    def check_row(self, store, row, expected):
        raise NotImplementedError

    def check(self, store, rows):
        assert store.num_rows == len(rows)
        held = sum(tensor.nbytes for tensor in store.tensors())
        assert store.num_bytes() == held
        assert reachable_bytes(store, {}) == (held if self.reserve is None else store.reserved_bytes())
        for row, expected in enumerate(rows):
            self.check_row(store, row, expected)

    def filled(self, data, least):
        """A store with some rows, written twice."""
        store, rows = self.make_store(), [self.empty_row() for _ in range(data.draw(st.integers(least, 2)))]
        store.admit(len(rows))
        self.write(store, rows, data)
        self.write(store, rows, data)
        return store, rows

    def take_snapshot(self, row):
        self.snapshots.append((self.store.snapshot_row(row), copy.deepcopy(self.rows[row])))

    def restore(self, store, rows, row, snapshot):
        store.restore_row(row, snapshot[0])
        rows[row] = copy.deepcopy(snapshot[1])
        self.check(store, rows)

    @initialize(data=st.data())
    def start(self, data):
        self.clock, self.snapshots = 0.0, []
        self.configure(data)
        self.store, self.rows = self.filled(data, 1)
        self.take_snapshot(0)

    @rule(count=st.integers(0, 2))
    def admit(self, count):
        count = min(count, max(0, MOST_ROWS - len(self.rows)))
        self.store.admit(count)
        self.rows += [self.empty_row() for _ in range(count)]

    @rule(data=st.data())
    def write_rows(self, data):
        self.write(self.store, self.rows, data)

    @rule(data=st.data())
    def select_rows(self, data):
        last = len(self.rows) - 1
        indices = data.draw(st.lists(st.integers(0, last), max_size=4)) if self.rows else []
        self.store.select_rows(torch.tensor(indices, dtype=torch.long))
        self.rows = [copy.deepcopy(self.rows[index]) for index in indices]

    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule(data=st.data())
    def join(self, data):
        store, rows = self.filled(data, 0)
        self.store.join(store)
        self.rows += copy.deepcopy(rows)
        self.check(store, rows)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def take_writes_back(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.take_snapshot(row)
        self.write(self.store, self.rows, data)
        self.restore(self.store, self.rows, row, self.snapshots[-1])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), elsewhere=st.booleans())
    def restore_row(self, data, elsewhere):
        """Also into a row that never was this one, and into another store."""
        store, rows = self.filled(data, 1) if elsewhere else (self.store, self.rows)
        row, snapshot = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.sampled_from(self.snapshots))
        if not elsewhere:
            self.take_snapshot(row)  # of what is about to go
        self.restore(store, rows, row, snapshot)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def copy_row(self, data):
        source, target = (data.draw(st.integers(0, len(self.rows) - 1)) for _ in range(2))
        promised, before = self.store.bytes_to_copy(source, target), self.store.num_bytes()
        self.store.copy_row(source, target)
        self.rows[target] = copy.deepcopy(self.rows[source])
        assert self.store.num_bytes() - before <= promised

    @rule(data=st.data())
    def reset(self, data):
        self.store.reset()
        assert self.store.num_rows == self.store.num_bytes() == 0
        self.store.admit(2)
        self.rows = [self.empty_row() for _ in range(2)]
        self.write(self.store, self.rows, data)

    @invariant()
    def agrees(self):
        self.check(self.store, self.rows)


SHAPES = {"sums": ((2, 3), torch.float64), "count": ((), torch.long)}
ROW_BYTES = 6 * 8 + 8


class StateMachine(RowMachine):
    """A row is a number a tensor: ``fill`` spreads it over the state."""

    def make_store(self):
        return StateStore(SHAPES, Placement(reserve=self.reserve))

    def empty_row(self):
        return dict.fromkeys(SHAPES, 0.0)

    def write(self, store, rows, data):
        name, part = data.draw(st.sampled_from(sorted(SHAPES))), data.draw(st.booleans())
        shape, dtype = SHAPES[name]
        value = torch.zeros(len(rows) + part, *shape, dtype=dtype)
        for row, expected in enumerate(rows):
            self.clock += 1.0
            expected[name] = self.clock
            value[row] = fill(name, self.clock)
        store[name] = value[: len(rows)]

    def check_row(self, store, row, expected):
        for name, number in expected.items():
            assert store[name].dtype == SHAPES[name][1]
            assert torch.equal(store[name][row], fill(name, number))


def fill(name, number):
    """State in which every element differs; zeros for a new row."""
    shape, dtype = SHAPES[name]
    steps = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    return (number * steps).to(dtype)


class ReservedStateMachine(StateMachine):
    """With memory for more rows than are here."""

    reserve = 4 * ROW_BYTES  # fewer than come, so that room is sometimes doubled and sometimes not


StateMachine.TestCase.settings = ReservedStateMachine.TestCase.settings = RUN
TestStateStore, TestReservedStateStore = StateMachine.TestCase, ReservedStateMachine.TestCase


def make_store(rows, reserve=None):
    store = StateStore(SHAPES, Placement(reserve=reserve))
    store.admit(rows)
    return store


def numbered(rows):
    """A reserved store whose rows hold 1, 2, 3, ..., and where its memory lies."""
    store = make_store(rows, reserve=16 * ROW_BYTES)
    for name in SHAPES:
        store[name] = torch.stack([fill(name, number) for number in range(1, rows + 1)])
    return store, [tensor.data_ptr() for tensor in store.tensors()]


def numbers(store):
    return store["count"].tolist(), [round(row.item()) for row in store["sums"][:, 0, 0]]


class Written(TorchDispatchMode):
    """Counts the elements that operators put into tensors of more than one dimension."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor, torch.ops.aten.cat.default):
            self.elements += result.numel() if result.dim() > 1 else 0
        return result


def test_reserved_rows_come_and_go_without_moving_others():
    """Room doubles; then a row costs what it holds, and one that leaves moves those behind it."""
    store, memory = numbered(4)
    joining, _ = numbered(1)
    assert store.reserved_bytes() == store.num_bytes() == 4 * ROW_BYTES
    store.join(joining)
    assert store.reserved_bytes() == 8 * ROW_BYTES and store.num_bytes() == 5 * ROW_BYTES
    memory = [tensor.data_ptr() for tensor in store.tensors()]
    for kept, moved in (((0, 1, 2, 3), 0), ((0, 1, 3), 1), ((2, 0), 2)):
        with Written() as written:
            store.select_rows(torch.tensor(kept))
        assert written.elements == 2 * 6 * moved  # to somewhere else, and from there
        assert [tensor.data_ptr() for tensor in store.tensors()] == memory
    assert numbers(store) == ([4, 1], [4, 1])
    with Written() as written:
        store.join(joining)
        store.admit(1)
    assert written.elements == 2 * 6 and numbers(store) == ([4, 1, 1, 0], [4, 1, 1, 0])
    assert store.reserved_bytes() == 8 * ROW_BYTES and store.num_bytes() == 4 * ROW_BYTES


def test_what_replaces_a_reserved_tensor_is_copied_to_where_that_lies():
    store, memory = numbered(3)
    whole = torch.randn(4, 3, 2, requires_grad=True)
    store["sums"] = whole[1:].mT
    assert torch.equal(store["sums"], whole[1:].mT.double()) and not store["sums"].requires_grad
    store["sums"].add_(1)
    store["sums"] = store["sums"]
    assert [tensor.data_ptr() for tensor in store.tensors()] == memory and store.reserved_bytes() == 3 * ROW_BYTES
    assert torch.equal(store["sums"], whole[1:].mT.double() + 1)


def test_bytes_are_announced_to_the_byte():
    store = make_store(2)
    assert store.num_bytes() == 2 * ROW_BYTES
    assert store.bytes_for(1000) == 0
    promised, before = store.bytes_for(7, rows=3), store.num_bytes()
    store.admit(3)
    assert store.num_bytes() - before == promised == 3 * ROW_BYTES
    assert store.free_bytes() == 0


def test_what_is_kept_carries_no_gradient_and_no_larger_tensor():
    store = make_store(2)
    whole = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    store["sums"] = whole[1:].mT
    assert torch.equal(store["sums"], whole[1:].mT)
    assert not store["sums"].requires_grad
    assert store.num_bytes() == 2 * ROW_BYTES


def test_dtypes_are_those_of_the_shapes():
    """Also where the rows come from a store of another precision."""
    store, other = make_store(1), StateStore({**SHAPES, "sums": ((2, 3), torch.float32)}, Placement())
    store["sums"] = torch.full((1, 2, 3), 0.5, dtype=torch.bfloat16)
    assert store["sums"].dtype == torch.float64 and store["sums"].eq(0.5).all()
    other.admit(1)
    other["sums"] = store["sums"] * 3
    other.join(store)
    assert other["sums"].dtype == torch.float32 and other["sums"].flatten(1).mean(1).tolist() == [1.5, 0.5]
    store.restore_row(0, other.snapshot_row(0))
    assert store["sums"].dtype == torch.float64 and store["sums"].eq(1.5).all()


@pytest.mark.parametrize("shape", [(2, 2, 3), (1, 3, 2), (1, 6), (2, 3)])
def test_a_wrong_shape_is_refused(shape):
    store = make_store(1)
    with pytest.raises(ValueError, match=r"state 'sums' is \(1, 2, 3\), not"):
        store["sums"] = torch.zeros(shape)
    assert store["sums"].eq(0).all()


def test_a_compiled_function_puts_in_what_it_computes():
    """Of any number of rows: a graph that knows no sizes asks none."""
    torch._dynamo.reset()
    store = StateStore({"sums": ((2, 3), torch.float32)}, Placement())

    @functools.partial(torch.compile, backend="eager", dynamic=True)
    def double(tensor):
        store["sums"] = (tensor + store["sums"]).mT.mT[:, :]

    expected = torch.zeros(0, 2, 3)
    for rows in (1, 2, 3):
        store.admit(1)
        added = torch.randn(rows, 2, 3)
        expected = torch.cat([expected, torch.zeros(1, 2, 3)]) + added
        double(added)
        assert torch.equal(store["sums"], expected)


@pytest.mark.parametrize("reserve", [None, 16 * ROW_BYTES])
def test_rows_lie_in_the_memory_of_somebody_else_while_they_are_asked_to(reserve):
    """What replaces a tensor is copied there, and other rows that lay there before are not touched."""
    store, memory = make_store(3, reserve), {name: torch.stack([fill(name, 9)] * 2) for name in SHAPES}
    own = store.tensors()
    store.lie_in(memory)
    assert store.num_rows == 2 and all(store[name] is memory[name] for name in SHAPES)
    for name in SHAPES:
        store[name] = torch.stack([fill(name, number) for number in (1, 2)])
        assert torch.equal(memory[name], torch.stack([fill(name, 1), fill(name, 2)]))
    assert not any(tensor.any() for tensor in own)
    with pytest.raises(ValueError, match="state 'sums' is"):
        store["sums"] = torch.zeros(3, 2, 3, dtype=torch.float64)
