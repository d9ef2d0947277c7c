"""Eviction policies on pages against their definitions: the same logits, and the same tokens kept by every head."""

from dataclasses import replace
from functools import cache as remember

import pytest
import torch

import kvtrain
from tests.hosts import exact, make_host, random_ids
from tests.models.naive_policies import naive_policy
from tests.models.naive_scores import Rule, round_to_nearest
from tests.thinning import thinned

LENGTH, PROMPT = 48, 29
HEADS = {"MHA": {"heads": 4, "kv_heads": 4}, "GQA": {"heads": 8, "kv_heads": 4}, "MQA": {"heads": 4, "kv_heads": 1}}
RULES = {"streamingllm": "streaming_llm", "expectedattention": "expected_attention"}
POLICIES = {
    "streamingllm": kvtrain.StreamingLLM(budget=8, sink=2),
    "h2o": kvtrain.H2O(budget=8, recent=3),
    "h2o every 5": kvtrain.H2O(budget=9, recent=2, sink=1, every=5),
    "h2o share": kvtrain.H2O(budget=0.4, recent=2, every=3),
    "h2o adaptive": kvtrain.H2O(budget=8, recent=3, every=4, per_head="adaptive", floor=0.3),
    "tova": kvtrain.TOVA(budget=8),
    "tova every 4": kvtrain.TOVA(budget=8, every=4),
    "snapkv": kvtrain.SnapKV(budget=10, recent=4),
    "snapkv every 6": kvtrain.SnapKV(budget=12, recent=4, every=6, kernel=3),
    "snapkv pyramid": kvtrain.SnapKV(budget=16, recent=4, every=2, per_layer="pyramid", beta=4.0),
    "snapkv adaptive": kvtrain.SnapKV(budget=12, recent=4, every=2, per_head="adaptive"),
    "expected": kvtrain.ExpectedAttention(budget=8, recent=0, sink=2, num_future=16),
    "expected every 5": kvtrain.ExpectedAttention(budget=9, sink=1, recent=2, every=5, epsilon=0.0),
    "expected mean": kvtrain.ExpectedAttention(
        budget=9, recent=0, sink=0, use_covariance=False, use_value_norm=False, every=3
    ),
    "expected adaptive": kvtrain.ExpectedAttention(budget=12, recent=3, sink=4, every=2, per_head="adaptive"),
    "corm": kvtrain.CORM(recent=4, window=6),
    "corm position": kvtrain.CORM(recent=4, window=6, every=3, threshold="position"),
    "d2o": kvtrain.D2O(budget=8, recent=3, sink=1),
    "d2o every 3": kvtrain.D2O(budget=8, recent=3, sink=0, every=3, smooth=0.7),
    "d2o variance": kvtrain.D2O(budget=12, recent=3, sink=1, every=2, per_layer="variance"),
    "mikv": kvtrain.MiKV(budget=8, recent=3),
    "mikv every 4": kvtrain.MiKV(budget=8, recent=3, every=4, low_bits=8),
    "mikv groups": kvtrain.MiKV(budget=8, recent=3, every=3, low_bits=2, group=4),
    "mikv balanced": kvtrain.MiKV(budget=8, recent=3, every=2, balance=True),
    "random": kvtrain.RandomEviction(budget=9, recent=2, seed=3),
}
CASES = [
    (name, heads, prompt)
    for name, policy in POLICIES.items()
    for heads in HEADS
    for prompt in ("dense", "blocks")
    if (prompt == "dense" or name not in ("d2o variance", "mikv balanced"))
    and not (heads == "MQA" and policy.name == "d2o" and "var" in name)
]
# Every policy as it is in blocks, and behind dense prompts with further settings.
SOME = [
    (name, heads, prompt)
    for name, heads, prompt in CASES
    if heads == "GQA" and prompt == ("dense" if " " in name else "blocks")
]


@remember
def host_of(heads, layers):
    return make_host("llama", layers=layers, **HEADS[heads])


def rule_of(policy, model):
    """The same settings for the definition."""
    known = {name: value for name, value in vars(policy).items() if name in Rule.__dataclass_fields__}
    special = {}
    if policy.name == "mikv":
        special["codec"] = round_to_nearest(policy.low_bits, policy.group)
    if policy.name == "random":
        special["random"] = lots(policy, model)
    return Rule(RULES.get(policy.name, policy.name), **{**known, **special})


def lots(policy, model):
    """What random eviction draws for a token: asked of a layer that keeps all."""
    cache = kvtrain.retrofit(model, replace(policy, budget=LENGTH)).make_cache()
    kvtrain.retrofit(model, replace(policy, budget=LENGTH))(random_ids(1, LENGTH), past_key_values=cache)
    scores = [policy.scores(layer)[0] for layer in cache.layers]
    return lambda layer, head, position: float(scores[layer][head, position])


def kept(layer, name="pages"):
    """Positions by head, ascending."""
    pages = getattr(layer, name)
    live, position = pages.live()[0], pages.field("position")[0]
    return [sorted(position[head][live[head]].tolist()) for head in range(pages.num_heads)]


@pytest.mark.parametrize(("name", "heads", "prompt"), thinned(CASES, SOME))
def test_a_policy_is_its_definition(name, heads, prompt):
    assert_definition(POLICIES[name], prompt, host_of(heads, 4 if "variance" in name else 2))


@pytest.mark.parametrize("name", [name for name in POLICIES if " " not in name])
def test_a_policy_is_its_definition_beside_learned_sinks(name):
    """What it is shown are the probabilities by which its host attends."""
    assert_definition(POLICIES[name], "dense" if name == "h2o" else "blocks", make_host("gpt_oss"))


@torch.no_grad()
def assert_definition(policy, prompt, host):
    policy, ids = replace(policy, prompt=prompt, page_size=4), random_ids(1, LENGTH, seed=9)
    naive = naive_policy(exact(host), rule_of(policy, host), ids[0], [range(PROMPT)])
    model = kvtrain.retrofit(host, policy)
    for chunks in ([PROMPT], [7, 1, 20, 1], [1] * PROMPT):
        cache, begin, logits = model.make_cache(), 0, []
        for size in chunks:
            logits.append(model(ids[:, begin : begin + size], past_key_values=cache, prefill=True).logits)
            begin += size
        cache.end_prompt()
        assert [kept(layer) for layer in cache.layers] == naive.held[PROMPT - 1].kept
        while begin < LENGTH:
            logits.append(model(ids[:, begin : begin + 1], past_key_values=cache).logits)
            begin += 1
            assert [kept(layer) for layer in cache.layers] == naive.held[begin - 1].kept
        torch.testing.assert_close(torch.cat(logits, 1)[0], naive.logits, atol=1e-9, rtol=0)
        if policy.name == "mikv":
            second = [[len(head) for head in layer] for layer in naive.held[-1].second]
            assert [layer.secondary.lengths[0].tolist() for layer in cache.layers] == second


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["dense", "blocks"])
@pytest.mark.parametrize("name", [name for name in POLICIES if " " not in name and name != "corm"])
def test_room_for_everything_is_the_full_cache(name, prompt):
    policy = replace(POLICIES[name], prompt=prompt, budget=LENGTH)
    host, ids = host_of("GQA", 2), random_ids(1, LENGTH, seed=9)
    full, model = kvtrain.retrofit(host, kvtrain.Full()), kvtrain.retrofit(host, policy)
    cache = model.make_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 26], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full(ids).logits, atol=1e-12, rtol=0)
