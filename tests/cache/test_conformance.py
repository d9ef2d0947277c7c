"""What every cache must do, whatever it keeps: one suite over all methods."""

import copy
import gc
import weakref
from functools import cache as remember

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtrain.cache.budget import ByteBudget, CacheFullError
from kvtrain.cache.paged import PagedStore
from kvtrain.models.registry import methods
from tests.caches import CACHES, PAIRS, SOME_CACHES, SOME_MAIN, SOME_PAIRS
from tests.hosts import make_host, random_ids
from tests.thinning import thinned

pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = 1e-9  # float64
NUMBERS = ("free", "_layout", "_places")  # of pages, which nobody counts
STREAMS, LENGTH = 5, 48


@remember
def model_of(method, family="llama", **settings):
    entry = CACHES[method]
    return entry.retrofit(make_host(family, layers=entry.layers, **settings))


@remember
def streams(method, family="llama"):
    """Token streams, and the logits of every prefix of them by the parallel form."""
    ids = random_ids(STREAMS, LENGTH, seed=3)
    with torch.no_grad():
        return ids, model_of(method, family)(ids, use_cache=False).logits


@pytest.fixture
def model(method):
    return model_of(method)


def filled(model, ids, mask=None):
    cache = model.make_cache()
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def reachable_bytes(thing, seen):
    """Storage bytes of every tensor that an object graph reaches, each storage once."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, list | tuple):
        for item in thing:
            reachable_bytes(item, seen)
    elif isinstance(thing, dict):
        reachable_bytes([value for name, value in thing.items() if name not in NUMBERS], seen)
    elif hasattr(thing, "__dict__"):
        reachable_bytes(vars(thing), seen)
    return sum(seen.values())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_every_method_is_here():
    assert {name.split("_")[0] for name in CACHES} == {*methods(), "transnormer"}


class RowsMachine(RuleBasedStateMachine):
    """Rows come, go, wait, change places and go back, and each is at every step what it would be alone."""

    method, options = "", {}

    @initialize()
    def start(self):
        self.model, (self.ids, self.expected) = model_of(self.method), streams(self.method)
        self.cache, self.rows, self.snapshots = self.make_cache(), [], []

    def make_cache(self):
        return self.model.make_cache(**self.options)

    @rule(count=st.integers(1, 2), data=st.data())
    def admit(self, count, data):
        assert list(self.cache.admit(count)) == list(range(len(self.rows), len(self.rows) + count))
        self.rows += [(data.draw(st.integers(0, STREAMS - 1)), 0) for _ in range(count)]

    @rule(data=st.data())
    def join(self, data):
        """A prompt is read in a cache of its own, which then joins."""
        row = (data.draw(st.integers(0, STREAMS - 1)), data.draw(st.integers(1, 20)))
        alone, move = filled(self.model, self.ids[row[0]][None, : row[1]]), data.draw(st.booleans())
        self.cache.join(alone, move=move)
        assert alone.num_rows == (0 if move else 1)
        self.rows.append(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read(self, data):
        """Every row takes some of its tokens, or none; padding stands anywhere."""
        counts = [min(data.draw(st.integers(0, 5)), LENGTH - seen) for _, seen in self.rows]
        width = max(1, *counts) + data.draw(st.integers(0, 1))
        self._forward([sorted(data.draw(st.permutations(range(width)))[:count]) for count in counts], width)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), ticks=st.integers(1, 7))
    def decode(self, data, ticks):
        """One token a row, or none for rows that wait."""
        for _ in range(ticks):
            self._forward([[0] if seen < LENGTH and data.draw(st.booleans()) else [] for _, seen in self.rows], 1)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read_some(self, data):
        """Passes over some rows, in any order, where they lie; all the others do not notice."""
        chosen = data.draw(
            st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=len(self.rows), unique=True)
        )
        with self.cache.rows(chosen):
            for count in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)):
                counts = [min(count, LENGTH - self.rows[row][1]) for row in chosen]
                self._forward([list(range(count)) for count in counts], count, chosen)

    def _forward(self, places, width, chosen=None):
        chosen = range(len(self.rows)) if chosen is None else chosen
        mask, ids = torch.zeros(2, len(places), width, dtype=torch.long)
        for index, row in enumerate(chosen):
            stream, seen = self.rows[row]
            mask[index, places[index]] = 1
            ids[index, places[index]] = self.ids[stream, seen : seen + len(places[index])]
        full = {} if bool(mask.all()) else {"attention_mask": mask}
        logits = self.model(ids, past_key_values=self.cache, **full).logits
        for index, row in enumerate(chosen):
            stream, seen = self.rows[row]
            end = seen + len(places[index])
            close(logits[index, places[index]], self.expected[stream, seen:end])
            self.rows[row] = (stream, end)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def select(self, data):
        indices = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=5))
        self.cache.reorder_cache(torch.tensor(indices))
        self.rows = [self.rows[index] for index in indices]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data):
        leaving = data.draw(st.sets(st.integers(0, len(self.rows) - 1)))
        self.cache.free_rows(sorted(leaving))
        self.rows = [row for index, row in enumerate(self.rows) if index not in leaving]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def clear(self, data):
        """Rows forget what they hold, and stay."""
        cleared = data.draw(st.sets(st.integers(0, len(self.rows) - 1)))
        self.cache.clear_rows(sorted(cleared))
        for row in cleared:
            self.rows[row] = (data.draw(st.integers(0, STREAMS - 1)), 0)

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data())
    def copy(self, data):
        source, target = (data.draw(st.integers(0, len(self.rows) - 1)) for _ in range(2))
        self.cache.copy_row(source, target)
        self.rows[target] = self.rows[source]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def snapshot(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.snapshots.append((self.rows[row], self.cache.snapshot_row(row)))

    @precondition(lambda self: self.rows and self.snapshots)
    @rule(data=st.data())
    def restore(self, data):
        """Also into another row, or after the row has long left."""
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.rows[row], state = data.draw(st.sampled_from(self.snapshots))
        self.cache.restore_row(row, state)

    @rule()
    def reset(self):
        self.cache.reset()
        self.rows = []

    @invariant()
    def counts(self):
        assert self.cache.num_rows == len(self.rows)
        assert self.cache.tokens.tolist() == [seen for _, seen in self.rows]
        if self.options:
            assert self.cache.free_bytes() == 0 and self.cache.kv_bytes() <= self.options["budget"]
        else:
            assert self.cache.kv_bytes() == reachable_bytes(self.cache, {})
            assert self.cache.free_bytes() <= self.cache.kv_bytes()
        unowned = self.cache.held_bytes() - int(self.cache.row_bytes().sum())
        assert unowned == 0


def _machine(name, examples=40, **options):
    machine = type(f"RowsMachine_{name}", (RowsMachine,), {"method": name, "options": options})
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=20)
    return machine.TestCase


TestRowsOfFull, TestRowsOfDMC = _machine("full"), _machine("dmc")
TestRowsOfDMS, TestReservedRowsOfDMS = _machine("dms", 20), _machine("dms", 10, budget=2**20, preallocate=True)
TestRowsOfLCKV, TestRowsOfSlidingLCKV = _machine("lckv", 15), _machine("lckv_sliding", 15)  # whose steps take longest
TestRowsOfCompensatedDuo = _machine("duo_compensated")
TestRowsOfT1, TestRowsOfT2 = _machine("transnormer_t1"), _machine("transnormer_t2")
# With pages that are reserved once, and rows of constant size whose memory is.
TestReservedRowsOfFull, TestReservedRowsOfDMC = (
    _machine(name, budget=2**20, preallocate=True) for name in ("full", "dmc")
)
TestReservedRowsOfLCKV, TestReservedRowsOfSlidingLCKV = (
    _machine(name, 8, budget=2**20, preallocate=True) for name in ("lckv", "lckv_sliding")
)
TestReservedRowsOfCompensatedDuo, TestReservedRowsOfT1, TestReservedRowsOfT2 = (
    _machine(name, 15, budget=2**20, preallocate=True)
    for name in ("duo_compensated", "transnormer_t1", "transnormer_t2")
)


# Policies: what fields, rings of queries, states and second stores go through.
TestRowsOfH2O, TestRowsOfSnapKV, TestRowsOfMiKV, TestRowsOfAdaptiveH2O = (
    _machine(name, 5) for name in ("h2o", "snapkv", "mikv", "h2o_adaptive")
)
TestReservedRowsOfSnapKV, TestReservedRowsOfMiKV = (
    _machine(name, 4, budget=2**20, preallocate=True) for name in ("snapkv", "mikv")
)


@pytest.mark.parametrize(("method", "family"), thinned(PAIRS, SOME_PAIRS))
def test_any_chunks_are_the_parallel_form(method, family):
    ids, expected = streams(method, family)
    for sizes in ([LENGTH], [1] * LENGTH, [17, 1, 1, 20, 9], [3] * 16):
        cache, begin = model_of(method, family).make_cache(), 0
        for size in sizes:
            logits = model_of(method, family)(ids[:, begin : begin + size], past_key_values=cache).logits
            close(logits, expected[:, begin : begin + size])
            begin += size
        assert cache.get_seq_length() == LENGTH == begin


@settings(max_examples=10)
@given(st.data())
@pytest.mark.parametrize(("method", "family"), thinned(PAIRS, SOME_PAIRS))
def test_padded_rows_are_rows_alone(method, family, data):
    """Padding at the left, at the right and in between; in prefill and with history; hidden states too."""
    with torch.no_grad():
        model, (ids, expected) = model_of(method, family), streams(method, family)
        mask = torch.tensor(
            data.draw(st.lists(st.lists(st.integers(0, 1), min_size=30, max_size=30), min_size=2, max_size=2))
        )
        padded = torch.full((2, 30), 7)
        for row in range(2):
            padded[row, mask[row] > 0] = ids[row, : int(mask[row].sum())]
        cut, cache = data.draw(st.integers(1, 29)), model.make_cache()
        first = model(padded[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache)
        second = model(padded[:, cut:], attention_mask=mask, past_key_values=cache, output_hidden_states=True)
        logits = torch.cat([first.logits, second.logits], 1)
        for row in range(2):
            close(logits[row][mask[row] > 0], expected[row, : int(mask[row].sum())])
        close(model.lm_head(second.hidden_states[-1]), second.logits)
        assert cache.tokens.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize(
    "shape",
    [{"heads": 8, "kv_heads": 2, "head_dim": 6}, {"heads": 2, "kv_heads": 1, "head_dim": 20}, {"attention_bias": True}],
    ids=["head_dim 6", "head_dim 20", "biases"],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", thinned(CACHES, SOME_CACHES))
def test_heads_of_any_width_biases_and_ties(method, shape, tied):
    """``head_dim`` is not hidden size over heads."""
    model, ids = model_of(method, tie_word_embeddings=tied, **shape), random_ids(2, 30)
    cache = model.make_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([11, 1, 18], 1)]
    close(torch.cat(parts, 1), model(ids, use_cache=False).logits)


def test_two_caches_do_not_touch(model, method):
    ids, expected = streams(method)
    first, second = model.make_cache(), model.make_cache()
    for token in range(20):
        close(model(ids[:2, token : token + 1], past_key_values=first).logits, expected[:2, token : token + 1])
        close(model(ids[2:, token : token + 1], past_key_values=second).logits, expected[2:, token : token + 1])


def test_nothing_stays_on_modules(model):
    def attributes():
        return {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}

    model(random_ids(1, 4))
    before = attributes()
    cache = filled(model, random_ids(2, 30))
    assert attributes() == before
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None


def test_memory_is_bounded_by_what_is_kept(model, method):
    """Pages of what is kept and at most one a head, as rows grow, leave and come back."""
    cache, streams = model.make_cache(), random_ids(6, 150)
    for begin in range(0, 150, 7):
        model(streams[: cache.num_rows or 6, begin : begin + 7], past_key_values=cache)
        if begin == 70:
            cache.free_rows([0, 3, 4])
        stores = [store for layer in cache.layers for store in layer.stores if isinstance(store, PagedStore)]
        assert stores or "sliding" in method or "transnormer" in method
        for pages in stores:
            lengths = pages.lengths
            slot = pages.pool.page_bytes // pages.page_size
            tables = pages.table.nbytes + pages.lengths.nbytes
            assert pages.num_bytes() - tables <= (int(lengths.sum()) + pages.page_size * lengths.numel()) * slot
            ahead = int(pages._ahead)  # a head that gains slots and loses some keeps the page of its next one
            columns = -(-(int(lengths.max()) + ahead) // pages.page_size)
            assert tables <= lengths.numel() * (4 * columns + 8)
    assert cache.free_bytes() <= cache.kv_bytes() / 8


def test_reset_gives_the_memory_back(model):
    ids = random_ids(2, 40)
    cache = filled(model, ids)
    first = cache.kv_bytes()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_rows == 0 and cache.kv_bytes() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)
    assert cache.kv_bytes() == first


@pytest.mark.parametrize("method", thinned(CACHES, SOME_CACHES))
def test_a_budget_is_kept_and_refuses_before_anything_changes(model, method):
    ids, expected = streams(method)
    budget = ByteBudget(filled(model, ids[:2]).kv_bytes() * 2)
    cache, other = model.make_cache(budget), model.make_cache(budget)
    refusal = ""
    for begin in range(0, LENGTH, 4):
        for half, rows in ((cache, ids[:3]), (other, ids[2:])):
            try:
                model(rows[:, begin : begin + 4], past_key_values=half)
            except CacheFullError as error:
                refusal = str(error)
            assert budget.used == cache.kv_bytes() + other.kv_bytes() <= budget.limit
        if refusal:
            break
    assert "free rows, feed fewer tokens at a time, or raise the budget" in refusal
    seen, state = cache.seen, [tensor.clone() for layer in cache.layers for s in layer.stores for tensor in s.tensors()]
    if cache.bytes_for(40 * LENGTH):  # some do not grow with the text
        with pytest.raises(CacheFullError):
            model(ids[:3].repeat(1, 40), past_key_values=cache)
    with pytest.raises(CacheFullError):
        cache.join(filled(model, ids.repeat(1, 8)))
    after = [tensor for layer in cache.layers for s in layer.stores for tensor in s.tensors()]
    assert cache.seen == seen and cache.num_rows == 3
    assert all(torch.equal(before, now) for before, now in zip(state, after, strict=True))
    other.reset()
    close(model(ids[:3, seen : seen + 1], past_key_values=cache).logits, expected[:3, seen : seen + 1])


def test_the_cache_counts_what_its_layers_keep(model):
    """Layers may differ in their heads."""
    cache = filled(model, random_ids(2, 11))
    counts = cache.kv_tokens()
    for layer, kept in zip(cache.layers, counts, strict=True):
        heads = layer.kv_tokens().shape[1]
        assert torch.equal(kept[:, :heads], layer.kv_tokens()) and not kept[:, heads:].any()
    heads = sum(layer.kv_tokens().shape[1] for layer in cache.layers)
    assert torch.equal(cache.mean_kv_tokens(), counts.double().sum((0, 2)) / heads)


def test_bytes_for_is_never_too_little(model):
    cache = model.make_cache()
    for tokens, rows in ((13, 2), (1, 0), (30, 0), (5, 0)):
        promised, before = cache.bytes_for(tokens, rows), cache.kv_bytes()
        model(random_ids(2, tokens), past_key_values=cache)
        spare = cache.free_bytes()
        assert cache.kv_bytes() - before <= promised + spare


# Ways to generate; variants of a method have one of them in the gating tiers.
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    "chunked prefill": {"prefill_chunk_size": 5},
}
GENERATING = [(method, way) for method in CACHES for way in WAYS]
SOME_GENERATING = [
    (method, way)
    for method, way in GENERATING
    if method in SOME_MAIN or (way == "several beams" and method in SOME_CACHES)
]


@pytest.mark.parametrize(("method", "way"), thinned(GENERATING, SOME_GENERATING))
def test_generating_with_the_cache_is_generating_without(model, way):
    """Left-padded prompts; the cache comes by itself."""
    ids, mask = random_ids(3, 14), torch.ones(3, 14, dtype=torch.long)
    for row, count in enumerate((0, 5, 9)):
        ids[row, :count], mask[row, :count] = 0, 0
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache, **WAYS[way]}
        if not use_cache:
            asked.pop("prefill_chunk_size", None)
        sequences.append(model.generate(ids, attention_mask=mask, **asked))
    assert torch.equal(*sequences)


def test_a_second_turn_goes_on_from_the_first(model, method):
    ids, _ = streams(method)
    first = model.generate(
        ids[:1, :10], max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    cache, text = first.past_key_values, torch.cat([first.sequences, ids[:1, 20:30]], 1)
    assert cache.get_seq_length() == 15 and type(cache).__name__ == "KVCache"
    again = model.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(again, model.generate(text, use_cache=False, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_refusals_name_the_remedy(model, method):
    ids = random_ids(2, 8)
    cache = filled(model, ids)
    if not method.startswith(("full", "duo")):  # which take tokens back: test_rollback.py
        with pytest.raises(ValueError, match="snapshot_row"):
            cache.crop(-1)
    with pytest.raises(ValueError, match="byte budget"):
        cache.offload(0)
    with pytest.raises(ValueError, match="the cache 2"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="padding mask"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="padding mask"):
        model(ids, attention_mask=torch.ones(2, 5), past_key_values=cache)
    if model.assisted_options() is None:
        with pytest.raises(ValueError, match="plain decoding"):
            model.generate(ids[:1], assistant_model=model, max_new_tokens=4, pad_token_id=0)
        with pytest.raises(ValueError, match="plain decoding"):
            model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(ValueError, match="kvtrain models alone"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="positive"):
        model.make_cache(0)
    with pytest.raises(ValueError, match="join itself"):
        cache.join(cache)
    with pytest.raises(ValueError, match="cannot admit -1"):
        cache.admit(-1)
    for ask in (
        cache.snapshot_row,
        lambda row: cache.free_rows([row]),
        lambda row: cache.select_rows(torch.tensor([row])),
    ):
        for row in (-1, 2):
            with pytest.raises(ValueError, match=f"no row {row}; this cache has 2"):
                ask(row)


def test_a_copy_is_a_cache_of_its_own_under_the_same_budget(model, method):
    ids, expected = streams(method)
    budget = ByteBudget(10**9)
    cache = model.make_cache(budget)
    model(ids[:2, :20], past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert budget.used == cache.kv_bytes() + copied.kv_bytes() == 2 * cache.kv_bytes()
    for half in (cache, copied):
        close(model(ids[:2, 20:30], past_key_values=half).logits, expected[:2, 20:30])


@pytest.mark.parametrize("options", [{}, {"budget": 2**22, "preallocate": True}], ids=["grown", "reserved"])
def test_no_gradient_flows_into_a_cache(model, options):
    with torch.enable_grad():
        cache = model.make_cache(**options)
        for tokens in (9, 9, 1, 1, 9):
            model(random_ids(2, tokens), past_key_values=cache).logits.sum().backward()
    model.zero_grad()
    assert not any(
        tensor.requires_grad for layer in cache.layers for store in layer.stores for tensor in store.tensors()
    )
