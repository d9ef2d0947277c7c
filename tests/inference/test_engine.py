"""The engine over real caches: every method's tokens, whatever stands beside them, and everything freed at the end."""

import functools
import logging
from dataclasses import replace
from functools import cache as remember
from math import log2

import pytest
import torch

import kvtrain
from kvtrain.inference.engine import runner
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.loop import EngineLoop
from kvtrain.inference.engine.request import Request, Sampling
from kvtrain.models.compiled import CompiledStep
from tests.caches import CACHES, MAIN, POLICIES, SOME_CACHES
from tests.hosts import VOCAB, make_host
from tests.inference.crowds import TIE, check, greedy, mix, serve
from tests.thinning import thinned

CANCELLED = (3, 7)
# The same with prompts that are read in full and then cut.
SERVED = [name for name in SOME_CACHES if name in POLICIES]
DENSE = {f"{name}_dense": replace(POLICIES[name], prompt="dense", page_size=4) for name in SERVED}
OTHER_HOSTS = {"dmc, experts": "qwen3_moe", "dmc, windows": "qwen2_sliding"}
METHODS = [*MAIN, *DENSE, *OTHER_HOSTS]
# Of policies one that cuts as it goes and two that cut prompts when they end.
SOME_METHODS = [
    name for name in METHODS if name in ("h2o", "snapkv_dense", "mikv_dense") or name not in {*POLICIES, *DENSE}
]
SWAPPED = [(name, None) for name in METHODS if name not in OTHER_HOSTS] + [
    (name, 0) for name in ("full", "dmc", "h2o", "h2o_dense", "mikv_dense")
]


@remember
def model_of(method):
    if method in DENSE:
        return kvtrain.retrofit(make_host(), DENSE[method])
    entry = CACHES[method.partition(",")[0]]
    return entry.retrofit(make_host(OTHER_HOSTS.get(method, "llama"), layers=entry.layers))


@remember
def expected(method):
    requests = mix(14, VOCAB, longest=30, most_new=10)
    return requests, greedy(model_of(method), requests)


@pytest.fixture(params=thinned(METHODS, SOME_METHODS))
def method(request):
    return request.param


def test_a_crowd_gets_the_tokens_of_generate(method):
    """With room for all, and with half as much as they would take; most steps of most answers count."""
    model, (requests, wanted) = model_of(method), expected(method)
    assert sum(len(tokens) for tokens, _ in wanted) > 0.6 * sum(r.max_new_tokens for r in requests)
    free = serve(model, requests, cancelled=CANCELLED)
    check(free, wanted)
    assert free.loop.scheduler.preemptions == 0 and free.loop.meter.cached_prompt_tokens >= 20
    tight = serve(model, requests, budget=int(0.45 * free.peak), cancelled=CANCELLED)
    check(tight, wanted)
    for outcome in (free, tight):
        outcome.loop.drop_kept_prefixes()
        cache = outcome.loop.runner.rows.cache
        assert cache.held_bytes() == 0 == outcome.loop.scheduler.swapped_bytes and cache.num_rows == 0


@pytest.mark.roads
def test_compiled_passes_give_the_same_tokens(monkeypatch, caplog):
    """Alone, two at a time, and eagerly beside more; each shape of a pass is compiled once in a life, and counted."""
    monkeypatch.setattr(runner, "CompiledStep", functools.partial(CompiledStep, backend="aot_eager"))
    model, (requests, wanted) = model_of("dmc"), expected("dmc")
    with caplog.at_level(logging.INFO, "kvtrain"):
        outcome = serve(model, requests, compiled_rows=2, max_requests=3)
    check(outcome, wanted)
    rows, pages = zip(*outcome.loop.runner._step._steps, strict=True)
    assert set(rows) == {1, 2} and all(count & (count - 1) == 0 for count in pages)
    assert outcome.loop.meter.stats.compilations == len(rows) <= 2 * (log2(max(pages)) + 1)
    words = "decoding passes over at most 2 rows are compiled; the first ones take long"
    assert [record.getMessage() for record in caplog.records] == [words]
    again = serve(model, requests, loop=outcome.loop)
    check(again, wanted)
    assert outcome.loop.meter.stats.compilations <= 2 * (log2(max(pages)) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", CACHES)
@pytest.mark.parametrize("kept_prefixes", [64, 0])
def test_a_larger_crowd_under_every_cache(method, kept_prefixes):
    model, requests = model_of(method), mix(64, VOCAB, seed=1, longest=60, most_new=30)
    wanted, cancelled = greedy(model, requests), range(0, 64, 9)
    free = serve(model, requests, cancelled=cancelled, kept_prefixes=0)
    tight = serve(model, requests, int(0.45 * free.peak), cancelled, kept_prefixes=kept_prefixes)
    for outcome in (free, tight):
        check(outcome, wanted)
        outcome.loop.drop_kept_prefixes()
        assert outcome.loop.runner.rows.cache.held_bytes() == 0
    assert tight.loop.scheduler.preemptions <= 0.1 * len(requests)


@pytest.mark.parametrize(
    ("method", "swap_bytes"), thinned(SWAPPED, [point for point in SWAPPED if point[0] in SOME_METHODS])
)
def test_rows_that_make_room_come_back_as_they_were(method, swap_bytes):
    """Admission that believes in short answers lets too many in; an answer that was forgotten comes as it came."""
    model = model_of(method)
    requests = [Request(range(3 + own, 11 + own), max_new_tokens=20, ignore_eos=True) for own in range(5)]
    wanted = greedy(model, requests)
    peak = serve(model, requests, per_step=5, kept_prefixes=0).peak
    limits = {"kept_prefixes": 0, "swap_bytes": swap_bytes}
    outcome = serve(model, requests, budget=int(0.6 * peak), per_step=5, hopeful=True, **limits)
    check(outcome, wanted)
    forecast = outcome.loop.forecast
    grows = forecast.row_bytes(1000) > 2 * forecast.row_bytes(0)
    preempted = outcome.loop.scheduler.preemptions > 0
    assert preempted == grows or (preempted and method in {*POLICIES, *DENSE})  # whose rows grow up to their budget
    assert outcome.loop.runner.rows.cache.held_bytes() == 0


@torch.no_grad()
@pytest.mark.parametrize("method", thinned(MAIN, [name for name in SOME_METHODS if name in MAIN]))
def test_ten_turns_read_no_token_twice(method):
    """And every answer is what one pass over the whole conversation says."""
    model, prompt, loop, answered = model_of(method), list(range(3, 25)), None, []
    for turn in range(10):
        outcome = serve(model, [Request(prompt, max_new_tokens=4, ignore_eos=True)], loop=loop)
        loop, usage = outcome.loop, outcome.finishes[0].usage
        assert usage.cached_prompt_tokens == (len(prompt) - 3 if turn else 0)
        assert loop.scheduler.read_tokens == 22 + 3 * turn  # an answer's last token was chosen and not yet fed
        assert usage.seen_tokens == len(prompt) + 3
        answered += range(len(prompt), len(prompt) + 4)
        prompt = [*prompt, *outcome.tokens[0], 30 + turn, 31]
    logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
    best = logits.topk(2)
    clear = [at for at in answered if best.values[at - 1, 0] - best.values[at - 1, 1] > TIE]
    assert [prompt[at] for at in clear] == [best.indices[at - 1, 0].item() for at in clear] and len(clear) > 30


@pytest.mark.parametrize("method", DENSE)
def test_turns_of_a_cut_prompt_are_prompts_of_their_own(method):
    """What a row keeps of a prompt that has ended is no beginning of a longer one; what it held before is."""
    model, prompt, loop = model_of(method), list(range(3, 25)), None
    for turn in range(4):
        request = Request(prompt, max_new_tokens=4, ignore_eos=True)
        outcome = serve(model, [request], loop=loop)
        loop = outcome.loop
        check(outcome, greedy(model, [request]))
        assert all(len(kept.tokens) < len(prompt) for kept in loop.scheduler.kept._kept.values())
        assert outcome.finishes[0].usage.cached_prompt_tokens == (0, 0, 22, 28)[turn]
        prompt = [*prompt, *outcome.tokens[0], 30 + turn, 31]


def test_a_common_prompt_is_read_once_and_gives_the_same_tokens(method):
    """Also where a prompt is cut in the middle of a block, or its last token is read alone."""
    model, common = model_of(method), list(range(3, 40))
    requests = [Request([*common, own, own + 1], max_new_tokens=4) for own in range(40, 44)]
    wanted = greedy(model, requests)
    for kept_prefixes, read in ((64, 37 + 4 * 2), (0, 4 * 39)):
        outcome = serve(model, requests, per_step=4, kept_prefixes=kept_prefixes)
        check(outcome, wanted)
        assert outcome.loop.scheduler.read_tokens == read


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(method):
    model, (requests, _) = model_of(method), expected(method)
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=40, presence_penalty=0.5, repetition_penalty=1.1, seed=5)
    request = Request(requests[3].prompt, max_new_tokens=8, sampling=sampling, ignore_eos=True)
    alone = serve(model, [request]).tokens[0]
    crowd = serve(model, [*requests[:4], request, *requests[4:6]]).tokens[4]
    other = Request(request.prompt, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=6), ignore_eos=True)
    assert alone == crowd and len(alone) == 8
    assert serve(model, [other]).tokens[0] != alone


def test_bytes_are_what_rows_hold(method):
    model = model_of(method)
    loop = EngineLoop(model, None, 1 << 26, Limits(kept_prefixes=0))
    outcome = serve(model, [Request(range(3, 33), max_new_tokens=8, ignore_eos=True)], loop=loop)
    usage = outcome.finishes[0].usage
    with torch.no_grad():
        cache = model.make_cache()
        model(torch.tensor([range(3, 33)]), past_key_values=cache)
        for token in outcome.tokens[0][:-1]:
            model(torch.tensor([[token]]), past_key_values=cache)
    assert usage.kept_tokens == pytest.approx(cache.mean_kv_tokens().item())
    assert usage.seen_tokens == 37 == cache.tokens.item()
    assert 0.7 * cache.kv_bytes() <= usage.held_bytes <= 1.3 * cache.kv_bytes()
    assert usage.plain_bytes >= 37 * 2 * 2 * 2 * 8 * 8  # two layers of two heads of eight channels at least


def test_a_budget_below_a_token_is_refused_with_both_figures(method):
    with pytest.raises(ValueError, match=r"a budget of 100 bytes is below one token, which takes [\d,]+; raise it"):
        EngineLoop(model_of(method), None, 100, Limits())


@pytest.mark.parametrize("prompt", ["blocks", "dense"])
def test_answers_of_any_length_are_let_in_where_rows_are_bounded(prompt):
    """Known before a row has come to its bound; a prompt that is read in full must fit as it is."""
    model = kvtrain.retrofit(make_host(), kvtrain.H2O(budget=256, recent=16, prompt=prompt, page_size=8))
    loop = EngineLoop(model, None, 1 << 18, Limits())
    loop.check(Request(range(3, 33), max_new_tokens=9000))
    long = Request([3] * 9000, max_new_tokens=2)
    if prompt == "blocks":
        loop.check(long)
        return
    with pytest.raises(ValueError, match=r"prompt comes to 9,000 tokens, which take about .* shorten the prompt$"):
        loop.check(long)
