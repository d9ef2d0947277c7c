"""DuoAttention while it serves: chunks, padding and other rows change nothing, and memory is what the formula says."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.cache.paged import PagedStore
from tests.hosts import random_ids
from tests.models.test_duo_forms import FRACTIONS, RECENT, SINK, Dense, close, gated, gates_for, host_of, rounded
from tests.thinning import slow

PROPERTY = settings(max_examples=20)
FULL_HEADS = ((1,), (), (0, 1))
# Sinks and latest tokens; rings that wrap at every token, at a page's end and in its middle.
WINDOWS = [(2, 5), (0, 3), (3, 1), (0, 1), (4, 4), (1, 6)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model_of(window=(SINK, RECENT), full_heads=FULL_HEADS, **settings):
    host = host_of(layers=len(full_heads))
    return rounded(host, full_heads, sink=window[0], recent=window[1], **settings)


def dense(ids, window=(SINK, RECENT), full_heads=FULL_HEADS, documents=None):
    reference = Dense(host_of(layers=len(full_heads)), *window)
    return reference.logits(ids, gates_for(full_heads), documents=documents)


def serve(model, ids, sizes, mask=None, cache=None):
    """Feed chunks of these sizes through one cache; logits of all, and the cache."""
    cache, mask = cache or model.make_cache(), torch.ones_like(ids) if mask is None else mask
    parts = zip(ids.split(sizes, 1), mask.split(sizes, 1), strict=True)
    logits = [model(part, attention_mask=real, past_key_values=cache).logits for part, real in parts]
    return torch.cat(logits, 1), cache


def cuts(length):
    """All ways to cut so many tokens into chunks."""
    for bits in range(2 ** (length - 1)):
        ends = [0, *(place for place in range(1, length) if bits >> (place - 1) & 1), length]
        yield [end - begin for begin, end in pairwise(ends)]


# Chunks.


@pytest.mark.parametrize("window", [(1, 2), slow((0, 3)), slow((2, 1))], ids=str)
def test_every_split_of_a_prompt_is_the_prompt(window):
    """All 64 of seven tokens; a window narrower than most chunks, and a page of two slots."""
    model, ids = model_of(window, page_size=2), random_ids(2, 7)
    expected = dense(ids, window)
    close(model(ids, use_cache=False).logits, expected)
    for sizes in cuts(7):
        close(serve(model, ids, sizes)[0], expected)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_long_texts_in_chunks_of_any_size(window):
    """Chunks shorter than the window and longer, tokens one by one, and all mixed."""
    draw, ids = random.Random(sum(window)), random_ids(2, 40)
    expected, model = dense(ids, window), model_of(window)
    for _ in range(4):
        marks = sorted(draw.sample(range(1, 40), draw.randint(1, 15)))
        close(serve(model, ids, [end - begin for begin, end in pairwise([0, *marks, 40])])[0], expected)
    for sizes in ([40], [1] * 40, [17, 1, 1, 20, 1], [window[0] + window[1]] * 2 + [1, 39 - 2 * sum(window)]):
        close(serve(model, ids, sizes)[0], expected)


def test_what_a_streaming_head_has_let_go_is_gone():
    """Beside the dense model: tokens between the sinks and the window touch no later logit, and those within do."""
    model = model_of(full_heads=((), ()))
    ids, other = random_ids(1, 30), random_ids(1, 30, seed=1)
    ids[0, -1] = other[0, -1] = 5
    for swapped, seen in ((range(2, 20), False), ([1], True), ([25], True)):
        changed = ids.clone()
        changed[0, swapped] = other[0, swapped]
        for sizes in ([30], [13] + [1] * 17):  # two layers look twice as far
            last = [serve(model, text, sizes)[0][:, -1] for text in (ids, changed)]
            assert bool((last[0] - last[1]).abs().max() > 1e-6) is seen


def test_no_slot_is_written_twice_at_once(monkeypatch):
    """Of several new tokens for one slot the order of writes would decide, and that is not defined."""
    write, written = PagedStore.write, []

    def check(store, entries, slots, keep=None):
        keep = torch.ones_like(slots, dtype=torch.bool) if keep is None else keep
        for head_slots, head_keep in zip(slots.flatten(0, 1), keep.flatten(0, 1), strict=True):
            kept = head_slots[head_keep].tolist()
            assert len(set(kept)) == len(kept)
            written.append(len(kept))
        write(store, entries, slots, None if slots.shape[2] == 1 else keep)

    monkeypatch.setattr(PagedStore, "write", check)
    for window in WINDOWS:
        serve(model_of(window), random_ids(2, 40), [1, 20, sum(window), sum(window) + 1, 18 - 2 * sum(window)])
    assert max(written) == 20


# Rows.


def padded(ids, lengths, side, filler=7):
    """The first tokens of every row, padded to more than the longest; a mask beside them, ``(B, T)`` both."""
    width = max(lengths) + 2
    tokens, mask = torch.full((len(lengths), width), filler), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        tokens[row, first : first + length], mask[row, first : first + length] = ids[row, :length], 1
    return tokens, mask


# Shorter than the sinks, than the window and than both together, as long, and far longer.
LENGTHS = [37, 1, SINK - 1, SINK, RECENT, SINK + RECENT, SINK + RECENT + 1, 20]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("window", [(SINK, RECENT), (0, 3), (4, 1)], ids=str)
def test_padded_rows_are_rows_alone(window, side):
    """Without a cache, and with one in chunks and token by token; gated as well as rounded."""
    ids, model = random_ids(len(LENGTHS), 37), model_of(window)
    expected = dense(ids, window)
    tokens, mask = padded(ids, LENGTHS, side)
    found = [model(tokens, attention_mask=mask, use_cache=False).logits]
    found += [serve(model, tokens, sizes, mask)[0] for sizes in ([39], [1] * 39, [4, 9, 3, 1, 22])]
    gates = gated(host_of(layers=3), gates_for(FULL_HEADS), sink=window[0], recent=window[1])
    found.append(gates(tokens, attention_mask=mask).logits)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length], use_cache=False).logits[0]
        close(alone, expected[row, :length])
        for logits in found:
            close(logits[row, mask[row] > 0], alone)


@PROPERTY
@given(st.data())
def test_padding_stands_anywhere_in_any_chunk(data):
    """With a cache padding may stand between tokens, rows may wait, and some chunks hold padding alone."""
    window = data.draw(st.sampled_from(WINDOWS))
    model, ids = model_of(window, page_size=data.draw(st.integers(1, 5))), random_ids(3, 24)
    expected = dense(ids, window)
    bits = st.lists(st.booleans(), min_size=24, max_size=24)
    mask = torch.tensor(data.draw(st.lists(bits, min_size=3, max_size=3))).long()
    tokens = torch.full((3, 24), 9)
    for row in range(3):
        tokens[row, mask[row] > 0] = ids[row, : int(mask[row].sum())]
    marks = sorted(data.draw(st.sets(st.integers(1, 23), max_size=8)))
    logits, cache = serve(model, tokens, [end - begin for begin, end in pairwise([0, *marks, 24])], mask)
    for row in range(3):
        close(logits[row, mask[row] > 0], expected[row, : int(mask[row].sum())])
    assert cache.tokens.tolist() == mask.sum(1).tolist()


def test_packed_documents_are_documents_alone():
    """Also those shorter than the sinks and the window; gated as well as rounded."""
    lengths = [3, 1, 20, SINK, SINK + RECENT, 9]
    ids, documents = random_ids(2, sum(lengths)), torch.cat([torch.full((n,), 3 + i) for i, n in enumerate(lengths)])
    documents = torch.stack([documents, documents.flip(0)])
    model = model_of()
    gates = gated(host_of(layers=3), gates_for(FULL_HEADS))
    for found in (model, gates):
        logits = found(ids, document_ids=documents, use_cache=False).logits
        for row, sizes in enumerate((lengths, lengths[::-1])):
            begin = 0
            for size in sizes:
                alone = model(ids[row : row + 1, begin : begin + size], use_cache=False).logits
                close(logits[row, begin : begin + size], alone[0])
                begin += size


@pytest.mark.parametrize("seed", range(6))
def test_rows_join_late_wait_change_places_and_leave(seed):
    """Each is at every step what it would be alone; some go back to where they were."""
    draw, texts = random.Random(seed), random_ids(4, 60)
    window = WINDOWS[seed]
    model, expected = model_of(window, page_size=draw.randint(1, 6)), dense(texts, window)
    cache, rows, saved = model.make_cache(), [], None
    for _ in range(25):
        event = draw.choice(["read", "read", "decode", "decode", "join", "leave", "swap", "save", "restore"])
        if event == "join" or not rows:
            text, seen = draw.randrange(4), draw.randint(1, 30)
            cache.join(serve(model, texts[text : text + 1, :seen], seen)[1])
            rows.append((text, seen))
        elif event == "leave" and len(rows) > 1:
            gone = draw.randrange(len(rows))
            cache.free_rows([gone])
            rows.pop(gone)
        elif event == "swap":
            order = [draw.randrange(len(rows)) for _ in rows]
            cache.reorder_cache(torch.tensor(order))
            rows = [rows[index] for index in order]
        elif event == "save":
            saved = rows[-1], cache.snapshot_row(len(rows) - 1)
        elif event == "restore" and saved:
            rows[0] = saved[0]
            cache.restore_row(0, saved[1])
        else:
            rows = read(model, cache, rows, texts, expected, draw, 6 if event == "read" else 1)
        assert cache.tokens.tolist() == [seen for _, seen in rows]


def read(model, cache, rows, texts, expected, draw, most):
    """Feed every row up to ``most`` of its next tokens, or none, and compare; where the rows are then."""
    counts = [min(draw.randint(0, most), 60 - seen) for _, seen in rows]
    width = max(1, *counts)
    tokens, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.long)
    for row, ((text, seen), count) in enumerate(zip(rows, counts, strict=True)):
        tokens[row, width - count :], mask[row, width - count :] = texts[text, seen : seen + count], 1
    logits = model(tokens, attention_mask=mask, past_key_values=cache).logits
    for row, ((text, seen), count) in enumerate(zip(rows, counts, strict=True)):
        close(logits[row, width - count :], expected[text, seen : seen + count])
    return [(text, seen + count) for (text, seen), count in zip(rows, counts, strict=True)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("window", [(SINK, RECENT), (0, 1)], ids=str)
def test_generating_with_the_cache_is_generating_without(window, options):
    """Left-padded prompts, far beyond where rings begin to wrap."""
    model, (tokens, mask) = model_of(window), padded(random_ids(3, 14), [14, 3, 1], "left", filler=0)
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    found = [model.generate(tokens, attention_mask=mask, use_cache=on, **asked) for on in (True, False)]
    assert torch.equal(*found) and found[0].shape == (3, 16 + 24)


# Memory.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [(SINK, RECENT), (0, 3), (3, 1), (0, 32)], ids=str)
def test_bytes_are_the_formula(window, dtype):
    """``D * 2 * b * sum(H_full * T + H_streaming * min(T, sink + recent))``, and at most a page a head more."""
    host, full_heads = host_of(layers=4, kv_heads=4, dtype=dtype), ((1,), (), (0, 1, 2, 3), (0, 3))
    model, page = rounded(host, full_heads, sink=window[0], recent=window[1], page_size=4), 4
    num_full, slot = sum(map(len, full_heads)), 8 * 2 * dtype.itemsize
    cache, seen = model.make_cache(), 0
    assert [layer.pages.page_size for layer in cache.layers] == [page] * 4
    for tokens in (1, 1, 1, 2, 1, 3, 20, 1, 1, 50, 1):
        model(random_ids(2, tokens), past_key_values=cache)
        seen += tokens
        tables = sum(layer.pages.table.nbytes + layer.pages.lengths.nbytes for layer in cache.layers)
        kept = num_full * seen + (16 - num_full) * min(seen, sum(window))
        found = cache.kv_bytes() - tables - cache.tokens.nbytes
        assert 2 * kept * slot <= found <= 2 * (kept + 16 * page) * slot
        assert found - cache.free_bytes() < 2 * (kept + 16 * page) * slot
        lengths = [[seen] * len(full) + [min(seen, sum(window))] * (4 - len(full)) for full in full_heads]
        assert cache.kv_tokens().tolist() == [[layer, layer] for layer in lengths]


def test_streaming_heads_take_constant_memory():
    """A model that streams entirely takes no byte more after its windows are full."""
    model, held = model_of(full_heads=((), ())), set()
    cache = model.make_cache()
    for step, part in enumerate(random_ids(2, 200).split([9, 1, 30, 1, 1, 58, 100], 1)):
        assert step == 0 or cache.bytes_for(10**6) == 0
        model(part, past_key_values=cache)
        held.add(cache.kv_bytes())
    assert len(held) == 1


def test_a_budget_knows_that_streaming_heads_stop_growing():
    """What it promises at most is enough, and what is left suffices for a long text where full heads have room."""
    model, ids = model_of(full_heads=((1,), ())), random_ids(1, 100)
    need = serve(model, ids, [100])[1].kv_bytes()
    cache = model.make_cache(budget=need + 8 * 4 * 8 * 2 * 8)  # and a page a head
    close(serve(model, ids, [60, 1, 39], cache=cache)[0], dense(ids, full_heads=((1,), ())))
    for tokens in (1, 5, 40):
        fresh = model.make_cache()
        promised = fresh.bytes_for(tokens, 1)
        model(ids[:, :tokens], past_key_values=fresh)
        assert fresh.kv_bytes() <= promised


# Gates that are fractions yet.


@pytest.mark.parametrize("mixing", ["self", "teacher"])
def test_gates_have_no_cache_and_say_what_to_do(mixing):
    """A forward pass does without one unasked; rounding gives one."""
    model, ids = gated(host_of(), FRACTIONS, mixing=mixing), random_ids(2, 12)
    for ask in (model.make_cache, lambda: model(ids, use_cache=True), lambda: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"model.binarize\(sparsity\).*or pass use_cache=False"):
            ask()
    output = model(ids)
    assert output.past_key_values is None
    close(output.logits, Dense(host_of()).logits(ids, FRACTIONS.double()))
    tokens = model.generate(ids, max_new_tokens=3, use_cache=False, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 12], output.logits[:, -1].argmax(-1))
    model.binarize(0.5)
    expected = Dense(host_of()).logits(ids, gates_for(model.method.full_heads))
    close(serve(model, ids, [5, 1, 6])[0], expected)
