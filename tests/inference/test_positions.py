"""Models that have learnt so many positions: what goes on beyond them is refused at once, with the remedy."""

import asyncio

import httpx
import pytest
import torch

import kvtrain
from kvtrain.inference.engine import Engine, Request, TooLargeError
from kvtrain.inference.generate import generate_text
from tests.caches import CACHES, transnormer
from tests.hosts import make_host
from tests.inference.server.servers import KEY, serve, tokenizer_with

POSITIONS = 24
REFUSAL = (
    "prompt and {field} come to {tokens} tokens, above the 25 to which the model's 24 positions reach; shorten the "
    "prompt or lower {field}"
)


def learned(positions=POSITIONS, **host):
    """A TransNormer that looks its positions up."""
    entry = transnormer("T2", position_embedding="learned", max_position_embeddings=positions)
    return entry.retrofit(make_host(layers=entry.layers, **host))


@pytest.mark.parametrize("name", CACHES)
def test_positions_that_are_computed_have_no_end(name):
    model = CACHES[name].retrofit(make_host(layers=CACHES[name].layers))
    assert model.max_positions is None


@pytest.mark.parametrize("positions", [1, 5, POSITIONS, 100])
def test_every_position_is_used_and_none_beyond(positions):
    """Also of fewer than the engine tries itself with."""
    model = learned(positions)
    assert model.max_positions == positions
    prompt = [7] * max(1, positions - 4)
    most = positions + 1 - len(prompt)
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=None)
    with Engine(model, None, 1 << 22) as engine:
        (answer,) = engine.generate(Request(prompt, max_new_tokens=most, ignore_eos=True))
        assert list(answer.token_ids) == expected[0, len(prompt) :].tolist() and answer.finish.reason == "length"
        with pytest.raises(TooLargeError, match=f"come to {positions + 2} tokens, above the {positions + 1} to which"):
            engine.generate(Request(prompt, max_new_tokens=most + 1))
        assert engine.health().ok


def test_generate_says_so_before_it_begins(tmp_path):
    folder = tmp_path / "learned"
    learned(vocab_size=4096).save_pretrained(folder)
    tokenizer_with(None).save_pretrained(folder)
    prompt = "import os"
    taken = generate_text(str(folder), prompt, max_new_tokens=1).seen_tokens
    assert generate_text(str(folder), prompt, max_new_tokens=POSITIONS + 1 - taken).seen_tokens <= POSITIONS
    with pytest.raises(ValueError, match="prompt and max_new_tokens come to 26 tokens") as caught:
        generate_text(str(folder), prompt, max_new_tokens=POSITIONS + 2 - taken)
    assert str(caught.value) == REFUSAL.format(field="max_new_tokens", tokens=26)


def test_a_server_refuses_with_413_and_gives_chats_what_is_left():
    model, short = learned(vocab_size=4096), "{% for m in messages %}{{ m.content }}{% endfor %}"

    async def ask(url):
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            body = {"model": "small", "prompt": [7] * 10, "max_tokens": 16, "ignore_eos": True}
            refused = await client.post("/v1/completions", json=body)
            served = await client.post("/v1/completions", json={**body, "max_tokens": 15})
            chat = {"model": "small", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
            return refused, served, await client.post("/v1/chat/completions", json=chat)

    with serve(model, tokenizer_with(short)) as served_model:
        refused, served, chat = asyncio.run(ask(served_model.url))
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (413, "prompt", "context_length_exceeded")
    assert error["message"] == REFUSAL.format(field="max_tokens", tokens=26)
    assert served.json()["usage"]["completion_tokens"] == 15
    usage = chat.json()["usage"]
    assert chat.status_code == 200 and usage["total_tokens"] == POSITIONS


def test_a_pass_beyond_them_is_an_error_of_the_input():
    model = learned()
    with torch.no_grad(), pytest.raises(ValueError, match="has learnt 24 positions; shorten the input"):
        model(torch.full((1, POSITIONS + 1), 7))
    assert isinstance(model, kvtrain.TransNormerForCausalLM)
