"""Full and streaming heads in 8 or 4 bits: what they compute, what comes back, what they take.

As in a full cache (``test_quantized.py``), every token reads all keys and values as pages hold them, its own too, with
a cache and without. What stands for dropped tokens is summed up from what pages hold or would hold of them.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

import kvtrain
from kvtrain.data.passkey import PasskeyTask
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.recall import recall
from kvtrain.models.duo.attention import DuoStep
from tests.cache.packed import packing, read
from tests.hosts import make_host, random_ids
from tests.thinning import thinned

SINK, RECENT, PAGE, DIM = 2, 5, 3, 8
FULL_HEADS, HEADS = ((1,), (), (0, 1)), 2
STREAMING = [HEADS - len(full) for full in FULL_HEADS]
TOLERANCE = 1e-9  # float64


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=[8, 4])
def bits(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["window", "compensated"])
def compensation(request):
    return request.param


def method_of(bits, compensation=False):
    window = {"sink": SINK, "recent": RECENT, "page_size": PAGE}
    return kvtrain.Duo(**window, full_heads=FULL_HEADS, compensation=compensation, kv_bits=bits)


def model_of(bits, compensation=False, dtype=torch.float64):
    return kvtrain.retrofit(make_host(layers=len(FULL_HEADS), dtype=dtype), method_of(bits, compensation))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


# What they compute.


def test_without_a_cache_it_is_attention_over_packed_keys_and_values(monkeypatch, bits, compensation):
    ids = random_ids(2, 24)
    expected = packing(monkeypatch, model_of(None, compensation), bits)(ids, use_cache=False).logits
    close(model_of(bits, compensation)(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("sizes", [1, [40], [17, 2, 12, 9], [4] * 10, [30, 1, 9]], ids=str)
def test_any_cut_is_what_there_is_without_a_cache(bits, compensation, sizes):
    ids, model = random_ids(2, 40), model_of(bits, compensation)
    close(read(model, ids, sizes)[0], model(ids, use_cache=False).logits)


def test_gates_are_judged_as_they_will_be_served(bits, compensation):
    """Open and shut gates in evaluation mode are the rounded heads; training mode does not quantize."""
    ids, host = random_ids(2, 24), make_host(layers=len(FULL_HEADS))
    model, plain = (kvtrain.retrofit(host, replace(method_of(b, compensation), full_heads=None)) for b in (bits, None))
    gates = [torch.tensor([float(head in full) for head in range(HEADS)]) for full in FULL_HEADS]
    told = {"use_cache": False, "step": DuoStep(gates=dict(enumerate(gates)))}
    close(model(ids, **told).logits, model_of(bits, compensation)(ids, use_cache=False).logits)
    close(model.train()(ids, **told).logits, plain(ids, **told).logits)
    rounded = model_of(bits, compensation).train()(ids, use_cache=False).logits
    close(rounded, model_of(None, compensation)(ids, use_cache=False).logits)


def test_logits_stay_near_the_unquantized_ones(bits, compensation):
    """As a share of their norm. Attention in these hosts is ten times too sharp."""
    ids = random_ids(2, 40, seed=3)
    exact, found = (model_of(b, compensation)(ids, use_cache=False).logits for b in (None, bits))
    assert 1e-5 < (found - exact).norm() / exact.norm() < {8: 3e-3, 4: 5e-2}[bits]


def test_passkeys_are_found_in_8_and_4_bits():
    """Half of the heads of the packaged model stream; read in pieces of 64 tokens."""
    tokenizer, task, found = load_tokenizer("kvtrain:copy"), PasskeyTask(passkeys=4, words=8), {}
    host = kvtrain.load("kvtrain:copy", dtype=torch.float32)
    chosen = ((1, 2), (), (0, 1, 2, 3), (2, 3))
    for bits in (None, 8, 4):
        model = kvtrain.retrofit(host, kvtrain.Duo(sink=4, recent=32, full_heads=chosen, kv_bits=bits))
        found[bits] = recall(model, tokenizer, "heldout", task, sequence_length=512, limit=6, chunk=64)
    assert found[None].token_accuracy > 0.98
    assert found[8].token_accuracy == found[None].token_accuracy
    assert found[4].token_accuracy > found[None].token_accuracy - 0.02
    plain = found[None].kv_bytes_per_1024
    assert found[8].kv_bytes_per_1024 / plain == pytest.approx(36 / 128, rel=0.03)  # D is 32, plain float32
    assert found[4].kv_bytes_per_1024 / plain == pytest.approx(20 / 128, rel=0.03)


# Rows, and what comes back.


def test_padded_rows_and_rows_that_join_are_rows_alone(bits, compensation):
    """Cut as they are alone; one is read in a cache of its own, and they change places."""
    model, ids, prompts = model_of(bits, compensation), random_ids(3, 30), (12, 7, 17)
    expected = [read(model, ids[row : row + 1], [at] + [1] * (30 - at))[0][0] for row, at in enumerate(prompts)]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    padded = torch.stack([ids[0, :12], torch.cat([torch.zeros(5, dtype=torch.long), ids[1, :7]])])
    cache = model.make_cache()
    logits = model(padded, attention_mask=mask, past_key_values=cache).logits
    close(logits[0], expected[0][:12])
    close(logits[1, 5:], expected[1][:7])
    cache.join(read(model, ids[2:, :17], 17)[1])
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    for _ in range(12):
        seen = cache.tokens.tolist()
        tokens = torch.stack([ids[2 - row, [at]] for row, at in enumerate(seen)])
        logits = model(tokens, past_key_values=cache).logits
        for row, at in enumerate(seen):
            close(logits[row, 0], expected[2 - row][at])


def held(cache):
    """What pages hold of every row and head, in order, byte for byte or number for number."""
    stores = [layer.pages for layer in cache.layers]
    pages = [
        store.pool.slots[name][store.table[row, head, : -(-int(length) // PAGE)]].flatten(0, 1)[: int(length)]
        for store in stores
        for row, lengths in enumerate(store.lengths)
        for head, length in enumerate(lengths)
        for name in ("keys", "values")
    ]
    return torch.cat([slots.flatten() for slots in pages])


TAKEN = [*product((1, 3, 6), (torch.float64, torch.bfloat16))]


@pytest.mark.parametrize(("count", "dtype"), thinned(TAKEN, [(3, torch.float64), (6, torch.bfloat16)]))
def test_what_is_taken_back_leaves_the_same_bytes(bits, compensation, dtype, count):
    """Again and again, one token at a time and all at once; in half types too."""
    model, ids = model_of(bits, compensation, dtype), random_ids(2, 40)
    before, cache = (read(model, ids[:, :25], 25, slack=6)[1] for _ in range(2))
    for turn in range(3):
        other = random_ids(2, count, seed=turn + 1)
        read(model, other, 1 if turn else count, cache)
        assert not torch.equal(held(cache), held(before))
        cache.rollback(count)
        assert torch.equal(held(cache), held(before))
        assert cache.kv_bytes() - cache.free_bytes() == before.kv_bytes() - before.free_bytes()
    found, expected = (read(model, ids[:, 25:], [4] + [1] * 11, half)[0] for half in (cache, before))
    if compensation:  # sums are taken apart again, which rounds
        assert (found - expected).norm() <= {torch.float64: 1e-9, torch.bfloat16: 0.02}[dtype] * expected.norm()
    else:
        assert torch.equal(found, expected)


def test_tokens_that_windows_never_held_come_back(bits, compensation):
    """A piece longer than a window: what left it at once is set aside as pages would have held it."""
    model, ids = model_of(bits, compensation), random_ids(2, 40)
    _, cache = read(model, ids[:, :24], [10, 14], slack=3)
    cache.rollback(3)
    _, straight = read(model, ids[:, :21], [10, 11])
    assert torch.equal(held(cache), held(straight))
    rest = [2] + [1] * 17
    close(read(model, ids[:, 21:], rest, cache)[0], read(model, ids[:, 21:], rest, straight)[0])


# What they take.


@pytest.mark.parametrize("tokens", [1, SINK + RECENT, 50])
@pytest.mark.parametrize("slack", [0, 4])
def test_bytes_are_the_formula(bits, compensation, tokens, slack):
    """``2 (D bits / 8 + 4)`` bytes a slot, of whole pages and of what is set aside; sums are not quantized."""
    model, rows, vector = model_of(bits, compensation), 3, DIM * bits // 8 + 4
    _, cache = read(model, random_ids(rows, tokens), tokens, slack=slack)
    expected = rows * 8
    for full, streaming in zip(map(len, FULL_HEADS), STREAMING, strict=True):
        pages = [-(-tokens // PAGE)] * full + [-(-min(tokens, SINK + RECENT) // PAGE)] * streaming
        expected += rows * (sum(pages) * PAGE * 2 * vector + HEADS * (4 * max(pages) + 8))
        expected += rows * (streaming * slack * 2 * vector + 8) if slack and streaming else 0
        expected += rows * streaming * 2 * DIM * 8 if compensation else 0
    assert cache.kv_bytes() == expected == model.make_cache(slack=slack).bytes_for(tokens, rows)


# Settings.


def test_caches_of_other_bits_cannot_join(bits):
    ids = random_ids(1, 12)
    for slack in (0, 3):
        _, cache = read(model_of(bits), ids, 12, slack=slack)
        for other in {None, 8, 4} - {bits}:
            with pytest.raises(ValueError, match=r"(make|give) both .*same model"):
                cache.join(read(model_of(other), ids, 12, slack=slack)[1])
        assert cache.num_rows == 1


def test_the_setting_outlives_rounding_and_saving(tmp_path, bits):
    model = kvtrain.retrofit(make_host(), kvtrain.Duo(sink=SINK, recent=RECENT, kv_bits=bits))
    assert model.method.as_served(model.config.host_config).kv_bits == bits
    model.binarize(0.5).save_pretrained(tmp_path)
    opened = kvtrain.load(tmp_path)
    assert opened.method == model.method and opened.method.kv_bits == bits
    _, cache = read(opened, random_ids(1, 20), 5)
    assert {layer.pages.bits for layer in cache.layers} == {bits}
