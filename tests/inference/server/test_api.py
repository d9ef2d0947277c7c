"""OpenAI's client against the server: texts, streams, usage, log-probabilities, turns, and clients that hang up."""

import json
import threading
import time

import httpx
import pytest
import torch

from kvtrain.inference.engine.loop import EngineLoop
from kvtrain.inference.prompt import prompt_ids
from tests.caches import MAIN, SOME_MAIN
from tests.inference.server.servers import KEY, ended, model_of, serve, tokenizer_with, until
from tests.thinning import thinned

PROMPTS = ["import os\n", "def walk(path):\n    return", "x"]
GREEDY = {"model": "small", "temperature": 0, "max_tokens": 12}


def generated_ids(model, ids, tokens=12, **settings):
    """What ``generate`` adds."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, **settings,
        )  # fmt: skip
    return output[0, len(ids) :].tolist()


def generated(model, tokenizer, text):
    """What ``generate`` says."""
    return tokenizer.decode(generated_ids(model, prompt_ids(tokenizer, text)), skip_special_tokens=True)


def streamed(stream):
    """Texts by index, ends by index, and the last usage of a stream of completions."""
    texts, ends, usage = {}, {}, None
    for part in stream:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason
    return texts, ends, usage


@pytest.mark.parametrize("method", thinned(MAIN, SOME_MAIN))
def test_texts_over_http_are_those_of_generate(method):
    model, tokenizer = model_of(method), tokenizer_with()
    expected = [generated(model, tokenizer, prompt) for prompt in PROMPTS]
    with serve(model, tokenizer) as served, served.client() as client:
        whole = client.completions.create(prompt=PROMPTS, **GREEDY)
        assert [choice.text for choice in whole.choices] == expected
        texts, _, _ = streamed(client.completions.create(prompt=PROMPTS, stream=True, **GREEDY))
        assert [texts[index] for index in range(3)] == expected
        again = client.completions.create(prompt=prompt_ids(tokenizer, PROMPTS[0]), **GREEDY)
        assert again.choices[0].text == expected[0]


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("small", "model") and client.models.retrieve("small") == model


def test_usage_says_what_the_cache_held(client, served):
    prompts, on = ["import os\n", "a longer text"], {"ignore_eos": True}
    reply = client.completions.create(prompt=prompts, n=2, extra_body=on, **GREEDY)
    usage = reply.usage
    lengths = [len(prompt_ids(served.engine.tokenizer, prompt)) for prompt in prompts]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert (usage.prompt_tokens, usage.completion_tokens) == (sum(lengths), 4 * 12)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    facts = usage.kvtrain
    assert facts["seen_tokens"] == 2 * sum(lengths) + 4 * 11
    assert 0 < facts["kept_tokens"] < facts["seen_tokens"]
    assert facts["compression"] == pytest.approx(facts["seen_tokens"] / facts["kept_tokens"], rel=1e-3)
    assert facts["plain_bytes"] == facts["seen_tokens"] * 2 * 2 * 2 * 8 * 8  # layers, K and V, heads, channels, bytes
    assert facts["held_bytes"] > 0 and facts["preemptions"] == 0


def test_streams_end_with_a_reason_and_usage_where_it_is_asked_for(client):
    asked = {"prompt": "import os\n", "n": 3, "stream": True, "extra_body": {"ignore_eos": True}, **GREEDY}
    texts, ends, usage = streamed(client.completions.create(stream_options={"include_usage": True}, **asked))
    assert len(set(texts.values())) == 1 and len(texts) == 3 and set(ends.values()) == {"length"}
    assert usage.completion_tokens == 36 and usage.kvtrain["compression"] > 1
    assert streamed(client.completions.create(**asked))[2] is None


def test_a_chat_is_the_text_that_its_template_makes(client, served):
    tokenizer = served.engine.tokenizer
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text = "<|endoftext|>system: Be short.\n<|endoftext|>user: Hi\n<|endoftext|>assistant: "
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    expected = tokenizer.decode(generated_ids(model_of("dmc"), ids), skip_special_tokens=True)
    reply = client.chat.completions.create(messages=messages, **GREEDY)
    assert reply.choices[0].message.content == expected and reply.choices[0].message.role == "assistant"
    assert reply.usage.prompt_tokens == len(ids)
    parts = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason in ("length", "stop")


def test_log_probabilities_of_both_forms(client):
    reply = client.completions.create(prompt="import os\n", logprobs=3, n=2, **GREEDY)
    for choice in reply.choices:
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
        assert "".join(logprobs.tokens[:3]) in choice.text
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert top[token] == value == max(top.values()) and len(top) == 3  # greedy takes the likeliest
        assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    parts = [
        entry
        for part in client.chat.completions.create(stream=True, **asked)
        for entry in (part.choices[0].logprobs.content if part.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in whole] == [entry.token for entry in parts] and len(whole) == 12
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in whole)
    assert all(entry.bytes == list(entry.token.encode()) for entry in whole if entry.bytes is not None)


def test_sampling_follows_the_request(client):
    def text(**fields):
        return (
            client.completions.create(**{"model": "small", "prompt": "x", "max_tokens": 12, **fields}).choices[0].text
        )

    assert text(seed=3) == text(seed=3) != text(seed=4)
    forced = {"temperature": 0, "logit_bias": {"300": 100}}
    assert len(set(text(**forced))) <= 12 and text(**forced) != text(temperature=0)
    assert text(frequency_penalty=2, **forced) == text(**forced)  # a bias of 100 is stronger
    assert text(temperature=0, extra_body={"repetition_penalty": 5.0}) != text(**forced)


def test_a_stop_string_ends_an_answer_and_is_named(client):
    whole = client.completions.create(prompt="import os\n", **GREEDY).choices[0].text
    stop = whole[8:11]
    choice = client.completions.create(prompt="import os\n", stop=[stop, "never"], **GREEDY).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_turns_of_a_chat_read_no_token_twice(served, client):
    """Though the tokenizer would cut most of these answers otherwise than they were written."""
    engine, messages = served.engine, []
    engine.drop_kept_prefixes()
    before, others, recut = engine.stats().prompt_tokens, ended(engine), 0
    for turn in range(5):
        messages.append({"role": "user", "content": f"and turn {turn}?"})
        asked = {"messages": messages, **GREEDY, "temperature": 1, "seed": turn, "extra_body": {"ignore_eos": True}}
        if turn % 2:
            parts = list(client.chat.completions.create(stream=True, **asked))
            said = "".join(part.choices[0].delta.content or "" for part in parts)
        else:
            reply = client.chat.completions.create(**asked)
            said, usage = reply.choices[0].message.content, reply.usage
        recut += len(engine.tokenizer.backend_tokenizer.encode(said, add_special_tokens=False).ids) != 12
        messages.append({"role": "assistant", "content": said})
    until(lambda: ended(engine) == others + 5)
    assert recut > 0 and usage.prompt_tokens_details.cached_tokens > 0
    assert engine.stats().prompt_tokens - before == usage.prompt_tokens - 4 * 11  # all but each answer's last token


@pytest.mark.roads
@pytest.mark.parametrize("method", thinned(MAIN, SOME_MAIN))
def test_ten_turns_are_one_pass_over_the_whole_conversation(method):
    """Every answer is what ``generate`` gives to all that was said before, read anew."""
    model, tokenizer = model_of(method), tokenizer_with()
    ids, messages, seen = [], [], ""
    with serve(model, tokenizer) as served, served.client() as client:
        for turn in range(10):
            messages.append({"role": "user", "content": f"and turn {turn}?"})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids += tokenizer.backend_tokenizer.encode(text.removeprefix(seen), add_special_tokens=False).ids
            new = generated_ids(model, ids, eos_token_id=None)
            reply = client.chat.completions.create(messages=messages, extra_body={"ignore_eos": True}, **GREEDY)
            said = reply.choices[0].message.content
            assert (said, reply.usage.prompt_tokens) == (tokenizer.decode(new, skip_special_tokens=True), len(ids))
            ids, seen = [*ids, *new], text + said
            messages.append({"role": "assistant", "content": said})
        until(lambda: ended(served.engine) == 10)
        read = served.engine.stats().prompt_tokens
    assert read == len(ids) - 12 - 9 * 11  # all but what was generated and fed


ENDLESS = {"model": "small", "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_forgotten_within_two_steps(served, stream, monkeypatch):
    engine, body, steps = served.engine, {**ENDLESS, "stream": stream, "n": 2}, []
    step = EngineLoop.step
    monkeypatch.setattr(EngineLoop, "step", lambda loop: (steps.append(1), time.sleep(0.2), step(loop)))
    before = ended(engine)
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body, timeout=60) as reply:
                lines = reply.iter_lines()
                next(lines)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.7)
    taken = len(steps)
    until(lambda: ended(engine) == before + 2)
    assert engine.stats().running == 0 and taken > 0
    assert len(steps) - taken <= 2  # beside the one that was running


def test_a_stream_pings_while_nothing_comes_and_loses_nothing(served, monkeypatch):
    monkeypatch.setattr("kvtrain.inference.server.api._PING", 0.05)
    gate, body = threading.Event(), {**ENDLESS, "max_tokens": 20, "stream": True}
    served.engine._commands.put(lambda loop: gate.wait())
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}) as client:
        with client.stream("POST", "/v1/completions", json=body) as reply:
            lines, pings = reply.iter_lines(), 0
            while pings < 3:
                pings += next(lines) == ": ping"
            gate.set()
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        whole = client.post("/v1/completions", json={**body, "stream": False}).json()["choices"][0]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_nobody_waits_longer_than_the_server_allows():
    with serve(model_of("dmc"), tokenizer_with(), request_timeout=0.4) as served, served.client() as client:
        asked = {"model": "small", "prompt": "x", "max_tokens": 3000, "temperature": 0}
        choice = client.completions.create(extra_body={"ignore_eos": True}, **asked).choices[0]
        assert (choice.finish_reason, choice.stop_reason) == ("length", "deadline") and choice.text
