"""Policies that kvpress has as well compute what it computes; ``make_kvpress_goldens.py`` has asked it."""

from functools import cache as remember
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain.assets import resolve

PROMPT, NEVER = 700, 10_000  # kvpress evicts nothing while it decodes
TOLERANCE = 1e-4  # float32
POLICIES = {
    "streaming_llm": (kvtrain.StreamingLLM, {}),
    "snapkv": (kvtrain.SnapKV, {}),
    "snapkv_adaptive": (kvtrain.SnapKV, {"per_head": "adaptive"}),
    "expected_attention": (kvtrain.ExpectedAttention, {"recent": 0}),
    "expected_attention_mean": (
        kvtrain.ExpectedAttention,
        {"recent": 0, "use_covariance": False, "use_value_norm": False, "epsilon": 0.0},
    ),
}


@remember
def goldens():
    return load_file(Path(__file__).with_name("kvpress_goldens.safetensors"))


@remember
def host():
    return AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny"), dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("dropped", [0.5, 0.75])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_that_of_kvpress(name, dropped):
    policy, settings = POLICIES[name]
    budget = int(PROMPT * (1 - dropped))
    model = kvtrain.retrofit(host(), policy(budget=budget, every=NEVER, **settings))
    ids, cache = goldens()["ids"][None].long(), model.make_cache()
    model(ids[:, :PROMPT], past_key_values=cache, prefill=True)
    cache.end_prompt()
    kept = cache.kv_tokens()[:, 0].float()  # (layers, heads)
    assert (kept.mean(1) == budget).all() and bool((kept == budget).all()) == ("adaptive" not in name)
    answer = [model(token, past_key_values=cache).logits[0, 0] for token in ids[:, PROMPT:].split(1, 1)]
    logits = torch.stack(answer)
    expected = goldens()[f"{name}/{dropped}/logits"]
    torch.testing.assert_close(logits[:, goldens()["columns"].long()], expected, atol=TOLERANCE, rtol=0)
    assert logits.argmax(-1).tolist() == goldens()[f"{name}/{dropped}/likeliest"].tolist()


def test_presses_differ_by_far_more_than_the_tolerance():
    logits = [tensor for name, tensor in goldens().items() if name.endswith("logits")]
    for index, one in enumerate(logits):
        for other in logits[:index]:
            assert (one - other).abs().max() > 1000 * TOLERANCE
