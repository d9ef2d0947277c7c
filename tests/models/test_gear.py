"""GEAR and KIVI: pages and packed blocks against the definition, what they hold, and where they are ``Full``."""

from dataclasses import replace

import pytest
import torch

import kvtrain
from kvtrain.models.hosts import key_value_shape
from tests.hosts import exact, make_host, random_ids
from tests.models.naive_policies import naive_policy
from tests.models.naive_scores import Rule
from tests.naive_blocks import naive_block
from tests.thinning import thinned

LENGTH, PROMPT = 48, 29
HEADS = {"MHA": (4, 4), "GQA": (8, 4), "MQA": (4, 1)}
METHODS = {
    "gear": kvtrain.GEAR(block=8, rank=2),
    "gear 4 bits": kvtrain.GEAR(bits=4, block=12, outliers=0.3, rank=1),
    "gear 8 bits": kvtrain.GEAR(bits=8, block=16, rank=3),
    "kivi": kvtrain.KIVI(block=8),
}
CASES = [(name, heads, prompt) for name in METHODS for heads in HEADS for prompt in ("dense", "blocks")]
SOME = [("gear", "GQA", "blocks"), ("gear", "MQA", "dense"), ("gear 4 bits", "GQA", "dense"), ("kivi", "GQA", "blocks")]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def host_of(heads):
    heads, kv_heads = HEADS[heads]
    return make_host("llama", layers=2, heads=heads, kv_heads=kv_heads)


def rule_of(method, host):
    """The same settings for the definition."""
    head_dim = key_value_shape(host.config, 0)[1]

    def pack(block, name):
        by, length = ("channel", method.block) if name == "keys" else ("token", head_dim)
        at_each_end = max(1, round(method.outliers * length / 2)) if method.outliers else 0
        return block.new_tensor(naive_block(block.numpy(), by, method.bits, at_each_end, method.rank)[0])

    return Rule("gear", every=method.block, prompt=method.prompt, pack=pack)


@pytest.mark.parametrize(("name", "heads", "prompt"), thinned(CASES, SOME))
def test_it_is_its_definition(name, heads, prompt):
    method, host, ids = (
        replace(METHODS[name], prompt=prompt, page_size=4),
        host_of(heads),
        random_ids(1, LENGTH, seed=9),
    )
    naive = naive_policy(exact(host), rule_of(method, host), ids[0], [range(PROMPT)])
    model = kvtrain.retrofit(host, method)
    for chunks in ([PROMPT], [7, 1, 20, 1], [1] * PROMPT):
        cache, logits = model.make_cache(), []
        for part in ids[:, :PROMPT].split(chunks, 1):
            logits.append(model(part, past_key_values=cache, prefill=True).logits)
        cache.end_prompt()
        for token in ids[:, PROMPT:].split(1, 1):
            logits.append(model(token, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, 1)[0], naive.logits, atol=1e-9, rtol=0)
        for layer, heads_of in zip(cache.layers, naive.layers, strict=True):
            assert layer.pages.lengths[0].tolist() == [len(head.slots) for head in heads_of.heads]
            assert (layer.secondary.lengths[0] * method.block).tolist() == [len(head.second) for head in heads_of.heads]


@pytest.mark.parametrize("prompt", ["dense", "blocks"])
def test_all_that_is_missed_beside_eight_bits_is_the_full_cache(prompt):
    host, ids = host_of("GQA"), random_ids(2, LENGTH, seed=9)
    method = kvtrain.GEAR(bits=8, block=8, rank=8, prompt=prompt)
    full, model = kvtrain.retrofit(host, kvtrain.Full()), kvtrain.retrofit(host, method)
    cache = model.make_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 26], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full(ids).logits, atol=1e-6, rtol=0)


def test_bytes_are_those_of_blocks_and_of_a_page_a_head():
    """At 2 bits and rank 4, heads of 128 channels: 0.297 of the keys in bfloat16, and 0.258 of the values."""
    host = make_host("llama", layers=2, heads=2, kv_heads=2, head_dim=128).to(torch.bfloat16)
    model = kvtrain.retrofit(host, kvtrain.GEAR())
    cache, ids = model.make_cache(), random_ids(1, 64 * 5 + 9)
    model(ids, past_key_values=cache, prefill=True)
    cache.end_prompt()
    heads, token = 2 * 2, 2 * 128 * 2  # of both layers; bytes of a key and a value
    blocks = 5 * heads * 64 * 128 * 2 * (0.296875 + 0.2578125)
    page = heads * 32 * token
    assert blocks + 9 * heads * token <= cache.kv_bytes() <= blocks + page + 4096
    before, allowed = cache.kv_bytes(), cache.bytes_for(64)
    for token in random_ids(1, 64).split(1, 1):
        model(token, past_key_values=cache)
    assert blocks / 5 <= cache.kv_bytes() - before <= allowed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "bits must be 8, 4 or 2, not 3; kvtrain.Full"),
        ({"block": 0}, "block must be at least 1 token, not 0"),
        ({"outliers": 1.0}, "outliers is a share of the entries from 0 to below 1, not 1.0"),
        ({"rank": -1}, "rank must be 0 or more, not -1"),
        ({"prompt": "whole"}, "prompt must be 'dense' or 'blocks', not 'whole'"),
        ({"page_size": 0}, "page_size must be at least 1 slot, not 0"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        kvtrain.GEAR(**settings)


def test_heads_that_come_out_in_no_whole_bytes():
    with pytest.raises(ValueError, match="vectors of 6 are no multiple of that; use 8 bits, or another block"):
        kvtrain.retrofit(host_of("GQA"), kvtrain.GEAR(block=6))


def test_what_it_is_called():
    said = kvtrain.GEAR().described_cache()
    assert (
        said
        == "GEAR, blocks of 64 tokens in 2 bits a channel with 2% outliers and rank 4, prompts whole until they end"
    )
    assert kvtrain.KIVI(bits=4, prompt="blocks").described_cache() == "KIVI, blocks of 64 tokens in 4 bits a channel"
