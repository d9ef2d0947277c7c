"""The ragged store against a dictionary, and its bytes."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtrain.cache.store import PagedStore

HEADS, DIM = 2, 3


class StoreMachine(RuleBasedStateMachine):
    """Random appends, overwrites and row changes; the model is a list of slots a row and head."""

    @initialize(page_size=st.integers(1, 5), rows=st.integers(1, 3))
    def start(self, page_size, rows):
        self.store = PagedStore(HEADS, page_size)
        self.slots = [[[] for _ in range(HEADS)] for _ in range(rows)]
        self.next_value = 1.0

    def _entry(self):
        self.next_value += 1.0
        return self.next_value

    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data, count):
        """Each head appends some entries; the first may overwrite its last slot."""
        rows = len(self.slots)
        keys, slots = torch.zeros(rows, HEADS, count, DIM), torch.zeros(rows, HEADS, count, dtype=torch.long)
        keep = torch.zeros(rows, HEADS, count, dtype=torch.bool)
        for row in range(rows):
            for head in range(HEADS):
                held = self.slots[row][head]
                place = len(held) - int(data.draw(st.booleans()) and len(held) > 0)
                for entry in range(count):
                    if not data.draw(st.booleans()):
                        continue
                    value = self._entry()
                    keys[row, head, entry], slots[row, head, entry], keep[row, head, entry] = value, place, True
                    held[place:] = [value]
                    place += 1
        self.store.write(keys, keys * 2, slots, keep)

    @rule(data=st.data())
    def select(self, data):
        if not self.store.num_rows:
            return
        indices = data.draw(st.lists(st.integers(0, len(self.slots) - 1), min_size=1, max_size=4))
        self.store.select_rows(torch.tensor(indices))
        self.slots = [[list(head) for head in self.slots[index]] for index in indices]

    @rule()
    def reset(self):
        self.store.reset()
        self.slots = [[[] for _ in range(HEADS)] for _ in self.slots]

    @invariant()
    def agrees(self):
        if not hasattr(self, "store") or not self.store.num_rows:
            return
        keys, values, exists = self.store.gather()
        for row, heads in enumerate(self.slots):
            for head, expected in enumerate(heads):
                assert int(self.store.lengths[row, head]) == len(expected)
                found = keys[row, head][exists[row, head]]
                assert found[:, 0].tolist() == expected
                assert values[row, head][exists[row, head]][:, 0].tolist() == [2 * value for value in expected]
        assert torch.isfinite(keys).all()

    @invariant()
    def owns_its_pages(self):
        """No page has two owners, none is lost, and no head owns a page that it does not need."""
        if not hasattr(self, "store") or not self.store.num_rows:
            return
        owned = self.store.table[self.store.table >= 0].tolist()
        free = self.store.free.tolist()
        assert sorted(owned + free) == list(range(self.store.keys.shape[0]))
        needed = -(-self.store.lengths // self.store.page_size)
        assert torch.equal((self.store.table >= 0).sum(-1), needed)


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None, derandomize=True)
TestStore = StoreMachine.TestCase


def test_bytes_are_those_of_the_pages():
    store = PagedStore(HEADS, 16)
    keys = torch.randn(2, HEADS, 40, DIM)
    keep = torch.ones(2, HEADS, 40, dtype=torch.bool)
    keep[1, 1, 5:] = False
    slots = torch.arange(40).expand(2, HEADS, -1)
    store.write(keys, keys, slots, keep)
    pages = 3 * 3 + 1
    assert store.keys.shape == (pages, 16, DIM)
    assert store.free_bytes() == 0
    assert store.keys.nbytes == pages * 16 * DIM * 4


def test_page_size_is_validated():
    with pytest.raises(ValueError, match="page_size"):
        PagedStore(2, 0)
