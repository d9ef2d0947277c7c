"""Caches as the outside sees them: bytes, rows, order."""

import pytest
import torch

import kvtrain
from tests.hosts import dmc_at_rate, make_host, random_ids


def filled(model, ids, mask=None):
    cache = model.make_cache()
    with torch.no_grad():
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
    elif hasattr(thing, "__dict__"):
        for item in vars(thing).values():
            reachable_bytes(item, seen)
    return sum(seen.values())


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_bytes_are_what_is_reachable_and_shrink_with_the_slots(rate):
    ids = random_ids(3, 300)
    model = dmc_at_rate(make_host("llama", dtype=torch.float32), rate, ids, page_size=16)
    cache, full = filled(model, ids), filled(kvtrain.retrofit(make_host("llama"), kvtrain.Full()).float(), ids)
    assert cache.kv_bytes() == reachable_bytes(cache.layers, {})
    heads, head_dim = 2, 8
    row_heads = 3 * heads
    for layer in cache.layers:
        slot = 2 * head_dim * 4
        pages = (-(-layer.kv_tokens() // 16)).sum().item()
        tables = layer.store.table.nbytes + layer.store.lengths.nbytes
        segment = row_heads * 11 * (2 * head_dim * 4 + 4)
        assert layer.kv_bytes() == pages * 16 * slot + tables + segment
        assert layer.kv_bytes() <= (layer.kv_tokens().sum().item() + 16 * row_heads) * slot + segment + tables
    if rate == 0.9:
        assert cache.kv_bytes() < 0.35 * full.kv_bytes()


def test_decoding_grows_by_pages_not_by_copies_kept():
    ids = random_ids(1, 200)
    model = dmc_at_rate(make_host("llama"), 0.5, ids)
    cache = model.make_cache()
    with torch.no_grad():
        for token in range(200):
            model(ids[:, token : token + 1], past_key_values=cache)
    whole = filled(model, ids)
    assert torch.equal(cache.kv_tokens(), whole.kv_tokens())
    assert cache.kv_bytes() - cache.free_bytes() <= whole.kv_bytes() * 1.1
    assert cache.free_bytes() <= whole.kv_bytes() / 8


@pytest.mark.parametrize("method", ["full", "dmc"])
def test_rows_can_be_selected_and_repeated(method):
    ids, more = random_ids(3, 33), random_ids(3, 5, seed=9)
    host = make_host("llama")
    model = kvtrain.retrofit(host, kvtrain.Full()) if method == "full" else dmc_at_rate(host, 0.5, ids)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        expected = model(more, past_key_values=filled(model, ids)).logits
        cache = filled(model, ids)
        cache.batch_select_indices(order)
        torch.testing.assert_close(model(more[order], past_key_values=cache).logits, expected[order])
        cache = filled(model, ids)
        cache.reorder_cache(order)
        torch.testing.assert_close(model(more[order], past_key_values=cache).logits, expected[order])
        cache = filled(model, ids)
        cache.batch_repeat_interleave(2)
        twice = model(more.repeat_interleave(2, 0), past_key_values=cache).logits
        torch.testing.assert_close(twice, expected.repeat_interleave(2, 0))


@pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.DMC()], ids=lambda m: m.name)
def test_reset_gives_the_memory_back(method):
    ids = random_ids(2, 40)
    model = kvtrain.retrofit(make_host("llama"), method)
    cache = filled(model, ids)
    first = cache.kv_bytes()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.kv_bytes() < first / 100
    with torch.no_grad():
        again = model(ids, past_key_values=cache).logits
        assert torch.equal(again, model(ids).logits)
    assert cache.kv_bytes() == first


def test_a_second_turn_goes_on_from_the_first():
    ids = random_ids(2, 60)
    model = dmc_at_rate(make_host("llama"), 0.5, ids)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.make_cache()
        model(ids[:, :25], past_key_values=cache)
        assert cache.get_seq_length() == 25
        torch.testing.assert_close(model(ids[:, 25:], past_key_values=cache).logits, whole[:, 25:], atol=1e-9, rtol=0)
