"""Two hundred clients at once, a tenth of whom hang up: nobody gets another's words, and nothing is left behind."""

import asyncio
import json
import random
import time

import httpx
import pytest
import torch

from kvtrain.inference.engine import Limits
from kvtrain.inference.prompt import prompt_ids
from tests import host_memory
from tests.inference.server.servers import KEY, ended, model_of, serve, tokenizer_with, until

CLIENTS = 200
LIMITS = Limits(max_requests=32, step_tokens=256, max_queue=512, max_new_tokens=64)


def conversations(tokenizer, model, count=24):
    """Prompts, a third of which begin alike, each with what ``generate`` says of it."""
    draw, words = random.Random(0), ["import os", "\\n", "def", " return", "class A:", " x", " = 1", " self"]
    prompts = [
        ("import os\\nimport sys\\n" * 3 if number % 3 == 0 else "")
        + "".join(draw.choices(words, k=draw.randint(1, 20)))
        for number in range(count)
    ]
    expected = []
    for number, prompt in enumerate(prompts):
        ids, tokens = prompt_ids(tokenizer, prompt), 4 + 3 * (number % 8)
        with torch.no_grad():
            mask = torch.ones(1, len(ids), dtype=torch.long)
            output = model.generate(
                torch.tensor([ids]), attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        expected.append((prompt, tokens, tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)))
    return expected


async def ask(client, prompt, tokens, stream, patience):
    """The text of an answer, or None where the client leaves before it is whole."""
    body = {"model": "small", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    try:
        async with asyncio.timeout(patience):
            if not stream:
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                return reply.json()["choices"][0]["text"]
            text = ""
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        assert "error" not in event, event
                        text += "".join(choice["text"] for choice in event["choices"])
            return text
    except TimeoutError:
        assert patience is not None
        return None


async def crowd(url, expected, seconds):
    """Answers and hang-ups of all clients, and the memory after each quarter of the time."""
    outcome, begun, memory = {"whole": 0, "left": 0}, time.monotonic(), []
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {KEY}"}

    async def come(number):
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120) as client:
            while time.monotonic() - begun < seconds:
                prompt, tokens, text = draw.choice(expected)
                patience = draw.uniform(0, 1) if draw.random() < 0.1 else None
                answer = await ask(client, prompt, tokens, draw.random() < 0.5, patience)
                outcome["whole" if answer is not None else "left"] += 1
                assert answer in (text, None)

    async def look():
        for _ in range(4):
            await asyncio.sleep(seconds / 4)
            memory.append(host_memory.anonymous())

    await asyncio.gather(look(), *(come(number) for number in range(CLIENTS)))
    return outcome, memory


@pytest.mark.parametrize(
    "seconds", [pytest.param(15, marks=pytest.mark.roads), pytest.param(120, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(600)
def test_a_crowd_of_which_a_tenth_hangs_up(seconds):
    tokenizer = tokenizer_with()
    expected = conversations(tokenizer, model_of("dmc"))
    with serve(model_of("dmc"), tokenizer, limits=LIMITS) as served:
        engine = served.engine
        outcome, memory = asyncio.run(crowd(served.url, expected, seconds))
        until(lambda: engine.stats().running == engine.stats().queued == 0)
        print(outcome, [size >> 20 for size in memory], engine.stats())
        assert outcome["whole"] > CLIENTS / 2 and outcome["left"] > 0.02 * outcome["whole"]
        until(lambda: ended(engine) >= outcome["whole"])
        reasons = dict(engine.stats().finished)
        assert set(reasons) <= {"length", "stop", "cancelled"} and reasons["cancelled"] > 0
        engine.drop_kept_prefixes()
        assert engine.stats().held_bytes == 0 == engine.stats().swapped_bytes
    assert max(memory) < 1.05 * memory[0] if seconds > 60 else max(memory) < 1.25 * memory[0]
