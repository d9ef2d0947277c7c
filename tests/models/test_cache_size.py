"""From which length on a method's cache takes no more than its host's."""

import pytest
import torch

import kvtrain
from kvtrain.models.cache_size import break_even, cache_bytes, host_kv_bytes
from tests.hosts import make_host, random_ids


@pytest.mark.parametrize("method", [kvtrain.DMC(compression=4.0), kvtrain.DMS(window=64), kvtrain.Full(kv_bits=8)])
def test_from_its_break_even_on_a_row_never_takes_more(method):
    config = make_host(layers=3).config
    per_token = host_kv_bytes(config, 1)
    more = [tokens for tokens in range(1, 1500) if cache_bytes(config, method, tokens) > per_token * tokens]
    assert more and break_even(config, method, 4096) == more[-1] + 1
    assert break_even(config, method, more[-1]) is None


def test_a_full_cache_in_pages_never_breaks_even():
    config = make_host(layers=3).config
    assert break_even(config, kvtrain.Full(), 2048) is None
    assert cache_bytes(config, kvtrain.Full(), 2048) > host_kv_bytes(config, 2048)


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (kvtrain.H2O(budget=40, recent=8, page_size=8), 40),
        (kvtrain.H2O(budget=40, recent=8, page_size=8, per_head="adaptive"), 40),
        (kvtrain.SnapKV(budget=0.25, recent=8, page_size=8), 50),
        (kvtrain.MiKV(budget=40, recent=8, page_size=8), 200),
    ],
    ids=["H2O", "adaptive", "share", "MiKV"],
)
def test_a_policy_takes_what_is_left_of_a_prompt(method, kept):
    """To two pages a head of what it really takes behind a prompt of 200 tokens, but for queries that are kept."""
    model = kvtrain.retrofit(make_host(layers=2, dtype=torch.bfloat16), method)
    cache = model.make_cache()
    with torch.no_grad():
        model(random_ids(1, 200), past_key_values=cache, prefill=True)
    cache.end_prompt()
    assert cache.mean_kv_tokens().tolist() == [kept]
    assert all(field.dtype in (torch.int32, torch.float32) for layer in cache.layers for field in fields(layer))
    two_pages = sum(2 * layer.num_heads * layer.pages.pool.page_bytes for layer in cache.layers)
    assert abs(cache_bytes(model.config.host_config, method, 200) - cache.kv_bytes()) <= two_pages
    assert cache.kv_bytes() < 0.8 * cache_bytes(model.config.host_config, kvtrain.Full(), 200)


def fields(layer):
    return [layer.pages.pool.slots[name] for name in layer.pages.slot_fields]
