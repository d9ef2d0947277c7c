"""Policies that read a prompt in full and cut it when it ends: chunks and neighbours change nothing."""

import random
from dataclasses import replace
from functools import cache as remember

import pytest
import torch

import kvtrain
from tests.caches import POLICIES
from tests.hosts import make_host, random_ids
from tests.thinning import slow

pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = 1e-9  # float64
LENGTH = 44
DENSE = {
    **{name: replace(policy, prompt="dense", page_size=4) for name, policy in POLICIES.items()},
    "mikv_balanced": kvtrain.MiKV(budget=9, recent=3, every=2, balance=True, page_size=4),
    "d2o_variance": kvtrain.D2O(budget=14, recent=3, sink=2, per_layer="variance", every=2, page_size=4),
}


@remember
def model_of(name):
    return kvtrain.retrofit(make_host("llama", layers=4 if name == "d2o_variance" else 2), DENSE[name])


@remember
def alone(name, stream, prompt):
    """Logits of one row: its prompt in one pass, and its answer token by token."""
    with torch.no_grad():
        ids, model = random_ids(4, LENGTH, seed=3)[stream][None], model_of(name)
        cache = model.make_cache()
        parts = [model(ids[:, :prompt], past_key_values=cache, prefill=True).logits]
        parts += [model(ids[:, [token]], past_key_values=cache).logits for token in range(prompt, LENGTH)]
        return ids[0], torch.cat(parts, 1)[0]


@pytest.mark.parametrize("seed", [0, slow(1), slow(2), slow(3)])
@pytest.mark.parametrize("name", DENSE)
def test_chunks_and_neighbors_change_nothing(name, seed):
    """Prompts differ, so that some rows read while others answer; some passes skip a row."""
    model, cache, draw = model_of(name), model_of(name).make_cache(), random.Random(seed)
    rows = [[stream, prompt, 0] for stream, prompt in enumerate((3, 26, 17))]  # with what has been fed
    cache.admit(len(rows))
    while any(fed < LENGTH for _, _, fed in rows):
        counts = [draw.randint(0, min(1 if fed >= prompt else 12, _left(prompt, fed))) for _, prompt, fed in rows]
        width = max(1, *counts)
        mask, ids = torch.zeros(2, len(rows), width, dtype=torch.long)
        for row, (count, (stream, prompt, fed)) in enumerate(zip(counts, rows, strict=True)):
            mask[row, width - count :] = 1
            ids[row, width - count :] = alone(name, stream, prompt)[0][fed : fed + count]
        reads = torch.tensor([fed < prompt for _, prompt, fed in rows])
        if draw.random() < 0.5:  # said at once, or by the first token of the answer
            cache.end_prompt([row for row, (_, prompt, fed) in enumerate(rows) if fed == prompt])
        logits = model(ids, attention_mask=mask, past_key_values=cache, prefill=reads).logits
        for row, (count, (stream, prompt, fed)) in enumerate(zip(counts, rows, strict=True)):
            expected = alone(name, stream, prompt)[1][fed : fed + count]
            torch.testing.assert_close(logits[row, width - count :], expected, atol=TOLERANCE, rtol=0)
            rows[row][2] += count


def _left(prompt, fed):
    """Tokens of the prompt, or of the row behind it."""
    return (LENGTH if fed >= prompt else prompt) - fed


@pytest.mark.parametrize("name", DENSE)
def test_generate_reads_densely_and_then_cuts(name):
    model, ids = model_of(name), random_ids(1, 21, seed=5)
    cache = model.make_cache()
    generated = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
    fresh, expected = model.make_cache(), ids
    logits = model(ids, past_key_values=fresh, prefill=True).logits
    for _ in range(6):
        token = logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], 1)
        logits = model(token, past_key_values=fresh).logits
    assert generated[0].tolist() == expected[0, : generated.shape[1]].tolist()  # which may end before


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova", "streamingllm", "random", "d2o"])
def test_the_end_of_a_prompt_gives_memory_back(name):
    """To a page a head of what is kept, named state aside; and it says so twice without harm."""
    model, ids = model_of(name), random_ids(3, 40, seed=6)
    cache = model.make_cache()
    model(ids, past_key_values=cache, prefill=True)
    assert (cache.kv_tokens() == 40).all()
    cache.end_prompt([1])
    budget = 16 if name == "random" else DENSE[name].budget
    assert cache.kv_tokens()[:, 1].unique().tolist() == [budget] and cache.kv_tokens()[:, 0].unique().tolist() == [40]
    cache.end_prompt()
    cache.end_prompt()
    assert cache.kv_tokens().unique().tolist() == [budget]
    for layer in cache.layers:
        pages = layer.pages
        slot = pages.pool.page_bytes // pages.page_size
        heads = pages.lengths.numel()
        table = pages.table.nbytes + pages.lengths.nbytes
        assert pages.num_bytes() - table <= (budget + pages.page_size) * heads * slot


@pytest.mark.parametrize("name", ["h2o", "snapkv", "mikv"])
def test_a_second_turn_reads_densely_over_what_was_kept_and_cuts_again(name):
    model, ids, more = model_of(name), random_ids(1, 21, seed=5), random_ids(1, 15, seed=8)
    ask = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cache, fresh = model.make_cache(), model.make_cache()
    first = model.generate(ids, past_key_values=cache, **ask)
    text = torch.cat([first, more], 1)
    second = model.generate(text, past_key_values=cache, **ask)
    model(ids, past_key_values=fresh, prefill=True)
    for token in first[:, 21:-1].split(1, 1):
        model(token, past_key_values=fresh)
    logits = model(text[:, 24:], past_key_values=fresh, prefill=True).logits
    assert (fresh.kv_tokens() >= 16).all()  # the second prompt is there, whole
    for token in second[0, 40:]:
        expected = logits[0, -1].index_fill(0, torch.tensor([model.generation_config.eos_token_id]), -torch.inf)
        assert expected.argmax() == token
        logits = model(token.view(1, 1), past_key_values=fresh).logits
    most = 44 if name == "mikv" else DENSE[name].budget + DENSE[name].every
    assert (cache.kv_tokens() <= most).all() and (fresh.kv_tokens() <= most).all()
