"""The packaged model under every method: generate, the engine alone, a crowd in little room, and HTTP say the same."""

import asyncio
import json
from dataclasses import replace
from functools import cache

import httpx
import pytest
import torch

import kvtrain
from kvtrain.inference.engine import Limits
from kvtrain.inference.load import load
from tests.caches import transnormer
from tests.hosts import dmc_at_rate, random_ids
from tests.inference.crowds import check, greedy, mix, serve
from tests.inference.server.servers import KEY, tokenizer_with
from tests.inference.server.servers import serve as serve_over_http

VOCABULARY = 4096
HALF = [list(range(4))] * 6
METHODS = {
    "full": lambda host: kvtrain.retrofit(host, kvtrain.Full()),
    "full 8 bit": lambda host: kvtrain.retrofit(host, kvtrain.Full(kv_bits=8)),
    "dmc": lambda host: dmc_at_rate(host, 0.75, random_ids(2, 100, seed=1)),
    "duo": lambda host: kvtrain.retrofit(host, kvtrain.Duo(sink=4, recent=12, full_heads=HALF)),
    "lckv": lambda host: kvtrain.retrofit(host, kvtrain.LCKV(kv_map="lckv-w2", forward_passes=2)),
    "cla2": lambda host: kvtrain.retrofit(host, kvtrain.LCKV(kv_map="cla2", init="mean")),
    "transnormer": transnormer("T2").retrofit,
}
CANCELLED = range(0, 64, 9)
pytestmark = pytest.mark.parametrize("method", METHODS)


@cache
def expected(method):
    """A model, requests for it, and what ``generate`` says to each up to the first tie, of which there are few."""
    model = METHODS[method](load("kvtrain:tiny", dtype=torch.float32)).eval()
    requests = [replace(request, ignore_eos=True) for request in mix(64, VOCABULARY, seed=2)]
    wanted = greedy(model, requests)
    steps, sure = sum(request.max_new_tokens for request in requests), sum(len(tokens) for tokens, _ in wanted)
    print(f"{method}: {sum(tied for _, tied in wanted)} ties, {sure} of {steps} tokens are compared")
    assert sure > 0.9 * steps
    return model, requests, wanted


@pytest.mark.slow
def test_the_engine_alone_and_in_a_crowd(method):
    model, requests, wanted = expected(method)
    check(serve(model, requests, max_requests=1, kept_prefixes=0), wanted)
    free = serve(model, requests, cancelled=CANCELLED, kept_prefixes=0)
    check(free, wanted)
    tight = serve(model, requests, budget=int(0.45 * free.peak), cancelled=CANCELLED)
    check(tight, wanted)
    assert tight.loop.meter.cached_prompt_tokens >= 20
    tight.loop.drop_kept_prefixes()
    assert tight.loop.runner.rows.cache.held_bytes() == 0 == tight.loop.scheduler.swapped_bytes


async def answer(client, request, stream, names):
    """Text, number of tokens, and names of tokens where they are asked for; whole or in parts."""
    body = {"model": "small", "prompt": request.prompt, "max_tokens": request.max_new_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream, "logprobs": 0 if names else None}
    if not stream:
        parts = [(await client.post("/v1/completions", json=body)).raise_for_status().json()]
    else:
        body["stream_options"] = {"include_usage": True}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            lines = [line async for line in reply.aiter_lines() if line.startswith("data: {")]
        parts = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [choice for part in parts for choice in part["choices"]]
    named = [name for choice in choices for name in (choice["logprobs"] or {"tokens": []})["tokens"]]
    return "".join(choice["text"] for choice in choices), parts[-1]["usage"]["completion_tokens"], named


@pytest.mark.roads
def test_http(method):
    """All at once, every other one streamed, and every third one with the names of its tokens."""
    model, requests, wanted = expected(method)
    tokenizer, limits = tokenizer_with(), Limits(max_requests=16, step_tokens=64)

    async def ask(url):
        headers, pool = {"authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=pool, timeout=120) as client:
            asked = (answer(client, r, number % 2 == 1, number % 3 == 0) for number, r in enumerate(requests))
            return await asyncio.gather(*asked)

    with serve_over_http(model, tokenizer, 1 << 26, limits) as served:
        answers = asyncio.run(ask(served.url))
    for number, (request, (tokens, tied), given) in enumerate(zip(requests, wanted, answers, strict=True)):
        text, count, named = given
        assert count == request.max_new_tokens
        sure = tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.startswith(sure.rstrip("\ufffd")) if tied else text == sure
        assert len(named) == (0 if number % 3 else count)
        assert named[: len(tokens)] == [name(tokenizer, token) for token in tokens][: len(named)]


def name(tokenizer, token):
    """A token's text, or its name in the vocabulary where it is part of a character: no two tokens share it."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text
