"""A paged store with fields beside its slots, out of which any slots may be evicted: against dictionaries of tokens."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvtrain.cache.budget import ByteBudget
from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.kernels.quantization import dequantize, quantize

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
        self.page_size, self.bits, self.dtype = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([8, 4])), None
        self.dtype = torch.float64


class ReservedEvictingMachine(EvictingMachine):
    """Pages are reserved, and hold what they held before they were taken."""

    reserved = True


for machine in (EvictingMachine, QuantizedEvictingMachine, ReservedEvictingMachine):
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=12)
TestEvictingStore = EvictingMachine.TestCase
TestQuantizedEvictingStore = QuantizedEvictingMachine.TestCase
TestReservedEvictingStore = ReservedEvictingMachine.TestCase
