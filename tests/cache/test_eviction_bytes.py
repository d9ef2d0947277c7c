"""What policies hold is what they say, and what a byte budget may count on."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain.assets import resolve
from kvtrain.cache.budget import CacheFullError
from tests.hosts import make_host, random_ids

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def host():
    return AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny"), dtype=torch.bfloat16).eval()


def bytes_after(host, method, page_size, ids):
    model = kvtrain.retrofit(host, method)
    cache = model.make_cache(page_size=page_size)
    model(ids, past_key_values=cache, prefill=True)
    cache.end_prompt()
    return cache.kv_bytes()


@pytest.mark.parametrize(("page_size", "most"), [(32, 0.35), (8, 0.32)])
def test_heads_of_unequal_budgets_save_what_their_mean_says(host, page_size, most):
    """Ada-KV at a quarter: where heads are masked instead, nothing is saved."""
    ids = torch.randint(2, 4096, (1, 700), generator=torch.Generator().manual_seed(1))
    full = bytes_after(host, kvtrain.Full(), page_size, ids)
    assert bytes_after(host, kvtrain.SnapKV(budget=175, per_head="adaptive"), page_size, ids) <= most * full


@pytest.mark.parametrize("per_head", ["same", "adaptive"])
def test_a_row_that_is_cut_in_blocks_never_needs_more(per_head):
    method = kvtrain.H2O(budget=12, recent=4, every=4, prompt="blocks", page_size=4, per_head=per_head)
    model, ids = kvtrain.retrofit(make_host(), method), random_ids(2, 300)
    cache = model.make_cache()
    most = cache.bytes_for(100, rows=2)
    assert most == cache.bytes_for(100_000, rows=2)
    cache = model.make_cache(most + most // 16)  # pools that grow may ask for a spare page of 16
    for part in ids.split([100, 1, 1, 7, 191], 1):
        model(part, past_key_values=cache)
        assert cache.kv_bytes() <= most
    cache.admit(1)
    with pytest.raises(CacheFullError):
        model(torch.cat([ids, ids[:1]])[:, :100], past_key_values=cache)


def test_a_dense_prompt_takes_what_it_is_until_it_ends():
    model, ids = kvtrain.retrofit(make_host(), kvtrain.H2O(budget=12, recent=4, page_size=4)), random_ids(1, 200)
    cache = model.make_cache()
    model(ids, past_key_values=cache, prefill=True)
    whole = cache.kv_bytes()
    cache.end_prompt()
    assert cache.kv_bytes() < whole / 10
