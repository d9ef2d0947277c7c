"""A decode step as one graph gives the tokens of the same step without, and leaves the same behind."""

import logging
from dataclasses import replace
from math import log2

import pytest
import torch

import kvtrain
from kvtrain.models.compiled import CompiledStep
from tests.caches import CACHES, POLICIES, Entry, lckv
from tests.hosts import make_host, random_ids

BUDGET = 2**22
GATING = ("full", "dmc", "lckv", "transnormer_t1", "cla2")  # the others are compiled where there is more time
FURTHER = {
    "cla2": lckv("0_0"),
    "full_8_bit": Entry(lambda host: kvtrain.retrofit(host, kvtrain.Full(kv_bits=8))),
}


@pytest.fixture(autouse=True)
def _alone():
    """Graphs of one test are none of another's."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def model_of(name):
    entry = {**CACHES, **FURTHER}[name]
    return entry.retrofit(make_host(layers=entry.layers))


def reading(model, ids):
    """A cache that holds ``ids``, with reserved pages."""
    cache = model.make_cache(BUDGET, preallocate=True)
    model(ids, past_key_values=cache)
    return cache


def eager(model, cache):
    return lambda token: model(token, past_key_values=cache).logits[:, -1]


def greedy(step, token, count):
    """Tokens ``(B, count)``, and the logits behind each."""
    tokens, logits = [token], []
    for _ in range(count):
        logits.append(step(tokens[-1]))
        tokens.append(logits[-1].argmax(-1, keepdim=True))
    return torch.cat(tokens[1:], 1), torch.stack(logits, 1)


def goes_on_alike(model, cache, other, step, token, count):
    """Greedy tokens by ``step``, which goes on from ``other``, and without it, and what both caches keep then."""
    tokens, logits = greedy(step, token, count)
    expected, expected_logits = greedy(eager(model, cache), token, count)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits)
    assert torch.equal(other.kv_tokens(), cache.kv_tokens())
    assert torch.equal(other.tokens, cache.tokens) and other.seen == cache.seen
    assert other.held_bytes() == cache.held_bytes()
    return tokens[:, -1:]


def agrees(name, prompt=33, count=4):
    model, ids = model_of(name), random_ids(2, prompt)
    cache, other = reading(model, ids), reading(model, ids)
    step = CompiledStep(model, other, backend="aot_eager")
    token = goes_on_alike(model, cache, other, step, ids[:, :1], count)
    assert 1 <= step.compilations <= 2
    # What a graph has left behind is what any pass goes on from.
    close = torch.testing.assert_close
    more = torch.cat([token, ids[:, :5]], 1)
    close(model(more, past_key_values=other).logits, model(more, past_key_values=cache).logits)


@pytest.mark.parametrize("name", GATING)
def test_a_compiled_step_gives_the_same_tokens(name):
    agrees(name)


@pytest.mark.parametrize("name", ["h2o", "mikv", "dense"])
def test_steps_that_decide_what_to_forget_run_eagerly_and_say_so(name, caplog):
    method = replace(POLICIES.get(name, POLICIES["h2o"]), prompt="dense" if name == "dense" else "blocks")
    model, ids = kvtrain.retrofit(make_host(), method), random_ids(2, 33)
    cache, other = reading(model, ids), reading(model, ids)
    with caplog.at_level(logging.WARNING, "kvtrain"):
        step = CompiledStep(model, other, backend="aot_eager")
    goes_on_alike(model, cache, other, step, ids[:, :1], 4)
    assert step.compilations == 0 and [record.getMessage() for record in caplog.records] == [
        "decode steps run eagerly, for what this cache forgets is decided in each of them"
    ]


@pytest.mark.roads
@pytest.mark.parametrize("name", sorted({*CACHES, *FURTHER} - {*GATING, *POLICIES}))
def test_a_compiled_step_of_every_other_cache(name):
    agrees(name)


@pytest.mark.roads
@pytest.mark.parametrize("name", ["full", "dmc"])
def test_a_life_takes_few_compilations(name):
    """Rows grow from their first token, another one joins, and one leaves."""
    model, ids = model_of(name), random_ids(2, 3)
    cache, other = reading(model, ids), reading(model, ids)
    step = CompiledStep(model, other, backend="aot_eager")
    token = goes_on_alike(model, cache, other, step, ids[:, :1], 150)
    pages = max(store.rows.owned().sum().item() for layer in other.layers for store in layer.stores[:1])
    assert step.compilations <= log2(pages) + 1
    for one in (cache, other):
        one.join(reading(model, random_ids(1, 20, seed=1)))
        one.free_rows([0])
    before = step.compilations
    goes_on_alike(model, cache, other, step, torch.cat([token[1:], token[:1]]), 5)
    assert step.compilations <= before + 1


@pytest.mark.roads
def test_rows_that_are_chosen_and_others_that_wait():
    model, ids = model_of("dmc"), random_ids(3, 20)
    cache, other = reading(model, ids), reading(model, ids)
    step = CompiledStep(model, other, backend="aot_eager")
    with cache.rows([2, 0]), other.rows([2, 0]):
        goes_on_alike(model, cache, other, step, ids[:2, :1], 4)
    assert torch.equal(other.kv_tokens(), cache.kv_tokens())
    more = random_ids(3, 4, seed=2)
    torch.testing.assert_close(model(more, past_key_values=other).logits, model(more, past_key_values=cache).logits)


def test_pages_must_be_reserved():
    model = model_of("full")
    with pytest.raises(ValueError, match="preallocate=True"):
        CompiledStep(model, model.make_cache(BUDGET), backend="aot_eager")


def test_what_cannot_be_compiled_runs_eagerly_and_says_so_once(caplog):
    model, ids = model_of("full"), random_ids(2, 9)
    cache, other = reading(model, ids), reading(model, ids)
    model.lm_head.forward = torch.compiler.disable(model.lm_head.forward)
    step = CompiledStep(model, other, backend="aot_eager")
    with caplog.at_level(logging.WARNING, "kvtrain"):
        goes_on_alike(model, cache, other, step, ids[:, :1], 3)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "decode steps run eagerly, for they cannot be compiled"
    ]
    assert step.compilations == 0
