"""The ring against a list of every token that went by."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from kvtrain.cache.ring import PagedRing, RingStore
from kvtrain.cache.rows import Placement

from .test_state import RUN, RowMachine

HEADS, DIM, VALUE_DIM = 2, 3, 1
DOUBLE = Placement(torch.float64)


def spread(numbers, channels):
    """Numbers ``(..., n)`` to ``(..., H, n, channels)`` of which no two are alike."""
    offsets = torch.arange(HEADS * channels, dtype=torch.float64).reshape(HEADS, 1, channels) / (HEADS * channels)
    return numbers[..., None, :, None] + offsets


class RingMachine(RowMachine):
    """A row is the list of its tokens, forgotten ones included."""

    def configure(self, data):
        self.recent, self.sink = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))

    def make_store(self):
        placement = replace(DOUBLE, reserve=self.reserve)
        return RingStore(HEADS, DIM, self.recent, self.sink, placement, VALUE_DIM)

    def empty_row(self):
        return []

    def write(self, store, rows, data):
        """From no token to more than the ring holds, padding anywhere."""
        length = data.draw(st.integers(1, 9))
        masks = data.draw(st.lists(st.integers(0, 2**length - 1), min_size=len(rows), max_size=len(rows)))
        valid = torch.tensor(masks, dtype=torch.long)[:, None] >> torch.arange(length) & 1 > 0
        numbers = self.clock + 1 + torch.arange(valid.numel(), dtype=torch.float64).reshape(valid.shape)
        self.clock += valid.numel()
        for tokens, new, mask in zip(rows, numbers, valid, strict=True):
            tokens += new[mask].tolist()
        keys = spread(numbers, DIM)
        store.write(keys, -spread(numbers, VALUE_DIM), valid)

    def check_row(self, store, row, expected):
        keys, values, positions = (tensor[row] for tensor in store.gather())
        kept = [p for p in range(len(expected)) if p < self.sink or p >= len(expected) - self.recent]
        assert sorted(positions[positions >= 0].tolist()) == kept
        assert positions.shape == (self.sink + self.recent,)
        slots = (positions >= 0).nonzero().squeeze(1)
        numbers = torch.tensor([expected[position] for position in positions[slots].tolist()], dtype=torch.float64)
        assert torch.equal(keys[:, slots], spread(numbers, DIM))
        assert torch.equal(values[:, slots], -spread(numbers, VALUE_DIM))
        assert int(store["tokens"][row]) == len(expected)


class ReservedRingMachine(RingMachine):
    """With memory for more rows than are here."""

    reserve = 2**10


RingMachine.TestCase.settings = ReservedRingMachine.TestCase.settings = RUN
TestRingStore, TestReservedRingStore = RingMachine.TestCase, ReservedRingMachine.TestCase


def test_a_token_stays_in_its_slot():
    """``p`` for the sink, then ``sink + (p - sink) % recent``."""
    store = RingStore(HEADS, DIM, recent=3, sink=2, placement=DOUBLE)
    store.admit(1)
    for end, expected in ((1, [0, -1, -1, -1, -1]), (4, [0, 1, 2, 3, -1]), (9, [0, 1, 8, 6, 7])):
        numbers = torch.arange(int(store["tokens"]), end, dtype=torch.float64)[None]
        store.write(spread(numbers, DIM), spread(numbers, DIM), torch.ones(1, numbers.shape[1], dtype=torch.bool))
        keys, _, positions = store.gather()
        assert positions.tolist() == [expected]
        assert [int(number) for number in keys[0, 0, :, 0]] == [max(position, 0) for position in expected]


def test_memory_is_constant_in_tokens_and_announced_to_the_byte():
    store = RingStore(HEADS, DIM, recent=5, sink=2, placement=DOUBLE, value_dim=VALUE_DIM)
    promised = store.bytes_for(100, rows=2)
    store.admit(2)
    assert store.num_bytes() == promised == 2 * (7 * HEADS * (DIM + VALUE_DIM) * 8 + 8)
    keys = torch.randn(2, HEADS, 40, DIM, dtype=torch.float64, requires_grad=True)
    store.write(keys, keys[..., :VALUE_DIM], torch.ones(2, 40, dtype=torch.bool))
    assert store.num_bytes() == promised and store.bytes_for(100) == 0
    assert not any(tensor.requires_grad for tensor in store.tensors())


@pytest.mark.parametrize(("recent", "sink"), [(0, 1), (-1, 0), (1, -1)])
def test_sizes_are_validated(recent, sink):
    with pytest.raises(ValueError, match=rf"not {recent} and {sink}"):
        RingStore(HEADS, DIM, recent, sink)


@pytest.mark.parametrize("page_size", [1, 3, 8])
def test_a_ring_of_pages_holds_the_same_and_no_page_before_it_is_needed(page_size):
    draw = torch.Generator().manual_seed(page_size)
    whole = RingStore(HEADS, DIM, recent=7, placement=DOUBLE)
    ring = PagedRing(HEADS, DIM, 7, page_size, DOUBLE)
    for store in (whole, *ring.stores):
        store.admit(3)
    for length in (1, 2, 1, 4, 9, 1, 20, 1):
        keys, values = torch.randn(2, 3, HEADS, length, DIM, dtype=torch.float64, generator=draw)
        valid = torch.rand(3, length, generator=draw) < torch.tensor([0.2, 0.6, 1.0])[:, None]
        for store in (whole, ring):
            store.write(keys, values, valid)
        expected, (found_keys, found_values, positions) = whole.gather(), ring.gather()
        slots = positions.shape[1]
        assert torch.equal(positions, expected[2][:, :slots])
        assert (expected[2][:, slots:] == -1).all()
        held = (positions >= 0)[:, None, :, None]
        for found, known in zip((found_keys, found_values), expected[:2], strict=True):
            assert torch.equal(found, torch.where(held, known[:, :, :slots], 0.0))
        pages = -(-whole["tokens"].clamp(max=7) // min(page_size, 7))
        assert torch.equal((ring.pages.table >= 0).sum((1, 2)), HEADS * pages)


def test_one_token_a_row_joins_a_ring_of_pages_as_many_do():
    keys, values = torch.randn(2, 2, HEADS, 12, DIM, dtype=torch.float64)
    rings = [PagedRing(HEADS, DIM, 5, 2, DOUBLE) for _ in range(2)]
    for ring in rings:
        for store in ring.stores:
            store.admit(2)
    rings[0].write(keys, values, torch.ones(2, 12, dtype=torch.bool))
    for token in range(12):
        question = rings[1].pages.ask_ahead()
        if question is not None:  # until all pages that there will be are taken
            rings[1].pages.take_ahead(question.tolist())
        rings[1].write(keys[:, :, token : token + 1], values[:, :, token : token + 1], None)
    for one, other in zip(*(ring.gather() for ring in rings), strict=True):
        assert torch.equal(one, other)
