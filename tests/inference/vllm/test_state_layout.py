"""State of constant size as bytes: nothing overlaps, nothing else changes, and a model over bytes is the model."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.cache.ring import RingStore
from kvtrain.cache.rows import Placement
from kvtrain.cache.state import StateStore
from kvtrain.inference.vllm.state_layout import StateLayout, cache_layout, model_layout
from tests.hosts import make_host
from tests.models.transnormer_reference import VOCAB, small_model

META = torch.device("meta")
DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]


def make_stores(shapes):
    """One store for every list of shapes, each with a counter."""
    return [
        StateStore({**{f"part{i}": part for i, part in enumerate(parts)}, "tokens": ((), torch.long)}, Placement())
        for parts in shapes
    ]


SHAPES = st.tuples(st.lists(st.integers(1, 3), max_size=3).map(tuple), st.sampled_from(DTYPES))
STORES = st.lists(st.lists(SHAPES, min_size=1, max_size=3), min_size=1, max_size=3).map(make_stores)


def noise(rows, layout):
    """Rows of bytes as somebody left them: not a number, in whatever dtype they are read."""
    return torch.full((rows, layout.num_pages * layout.piece_bytes), 0xFF, dtype=torch.uint8)


def items(layout):
    """All tensors of all stores but counters."""
    return [(store, name) for store in layout.stores for name in store.shapes if name != "tokens"]


@settings(max_examples=40)
@given(stores=STORES, page_bytes=st.none() | st.integers(1, 12).map(lambda words: 8 * words))
def test_every_tensor_has_bytes_of_its_own_and_pages_hold_them_all(stores, page_bytes):
    layout = StateLayout(stores, page_bytes)
    needed = sum(torch.Size(shape).numel() * dtype.itemsize for s in stores for shape, dtype in s.shapes.values())
    needed -= 8 * len(stores)  # counters
    assert needed <= layout.num_bytes <= needed + 8 * len(items(layout))
    assert layout.num_pages * layout.piece_bytes >= layout.num_bytes
    assert page_bytes is None or layout.piece_bytes <= page_bytes
    assert layout.num_pages == (1 if page_bytes is None else -(-layout.num_bytes // page_bytes))
    rows = noise(3, layout)
    layout.open(rows, torch.tensor([1, 1, 1]))
    owners = torch.zeros_like(rows)
    for store, name in items(layout):
        before = rows.clone()
        bits = store[name].contiguous().view(-1).view(torch.uint8)
        store[name] = (~bits).view(store[name].dtype).view(store[name].shape)
        changed = rows != before
        assert int(changed.sum()) == store[name].numel() * store[name].element_size()
        owners += changed
        first = changed[0].nonzero()
        assert int(first[0]) % 8 == 0 and int(first[-1] - first[0]) + 1 == len(first)  # aligned, and in one piece
    assert int(owners.max()) == 1 and int(owners.sum()) == 3 * needed


def test_rows_that_begin_are_cleared_and_others_are_as_they_were():
    store = RingStore(2, 3, recent=4, sink=1, placement=Placement(torch.float64))
    layout = StateLayout([store], page_bytes=104)
    assert layout.num_pages == 5  # 480 bytes
    rows, past = noise(3, layout), torch.tensor([7, 0, 1])
    layout.open(rows, past)
    assert (rows[1] == 0).all() and (rows[0] == 0xFF).all() and (rows[2] == 0xFF).all()
    assert store["keys"][0].isnan().all() and not store["keys"][1].any() and not store["values"][1].any()
    assert torch.equal(store["tokens"], past)
    store.write(torch.ones(3, 2, 1, 3), torch.ones(3, 2, 1, 3), None)
    assert past.tolist() == [7, 0, 1] and store["tokens"].tolist() == [8, 1, 2]  # the caller's stay the caller's


def test_a_state_that_grows_has_no_page():
    cache = kvtrain.retrofit(make_host(), kvtrain.Full()).make_cache()
    with pytest.raises(AssertionError, match="grows"):
        cache_layout(cache)


@pytest.mark.parametrize(
    ("settings", "dtype", "expected"),
    [
        ({"hidden_size": 256, "num_hidden_layers": 6}, torch.float32, 491_520),
        ({"hidden_size": 128, "num_hidden_layers": 4}, torch.float32, 2 * (2 * 8 * 64 * 16 * 4 + 8 * 16 * 16 * 4)),
        # Sums stay in float32, and a head of a block layer has as many channels more as there are fewer of them.
        (
            {"hidden_size": 128, "num_hidden_layers": 3, "num_block_heads": 2, "block_size": 32},
            torch.bfloat16,
            2 * 32 * 128 * 2 + 2 * 8 * 16 * 16 * 4,
        ),
    ],
)
def test_the_bytes_of_a_transnormer_are_those_of_its_formula(settings, dtype, expected):
    """Half of the layers 2 H w D elements, half of them H D D in float32."""
    layout = model_layout(kvtrain.TransNormerConfig(**settings), dtype)
    assert layout.num_bytes == layout.piece_bytes == expected and layout.num_pages == 1
    assert {store.placement.device for store in layout.stores} == {META}


# Of requests, with new tokens each: some begin, some decode, some read another chunk, and one comes late.
STEPS = [
    {0: 4},
    {0: 1, 1: 7},
    {0: 1, 1: 1, 2: 12},
    {0: 6, 1: 6, 2: 1},
    {0: 1, 2: 1},
    {0: 3, 1: 3, 2: 9},
    {0: 1, 1: 1, 2: 1},
]


@pytest.mark.parametrize("page_bytes", [None, 1000], ids=["one page", "pages"])
@pytest.mark.parametrize("settings", [{"variant": "T1", "num_block_heads": 1}, {"decay": "paper"}], ids=["T1", "T2"])
@torch.no_grad()
def test_a_model_over_rows_of_bytes_is_the_model_over_its_own_cache(settings, page_bytes):
    """Requests in any company: exactly what the same passes over some rows of one ordinary cache give."""
    model = small_model(**settings)
    served, ordinary = model.make_cache(), model.make_cache()
    ordinary.admit(3)
    layout = StateLayout(served.stores, page_bytes)
    memory = noise(5, layout)  # rows lie anywhere in it
    places, past = torch.tensor([3, 0, 4]), torch.zeros(3, dtype=torch.long)
    ids = torch.randint(2, VOCAB, (3, 64), generator=torch.Generator().manual_seed(0))
    for step in STEPS:
        for size, group in itertools.groupby(sorted(step, key=step.__getitem__), step.__getitem__):
            members = torch.tensor(list(group))
            new = torch.stack([ids[row, past[row] : past[row] + size] for row in members])
            rows = memory[places[members]]
            layout.open(rows, past[members])
            found = model.model(inputs_embeds=model.model.embed_tokens(new), past_key_values=served)
            memory[places[members]] = rows
            with ordinary.rows(members.tolist()):
                expected = model.model(new, past_key_values=ordinary)
            assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
            past[members] += size
            assert torch.equal(served.tokens, past[members])
    assert past.tolist() == [17, 18, 24]
    assert (memory[[1, 2]] == 0xFF).all()
