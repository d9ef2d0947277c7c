"""What a client must not send, who may not ask, and what is refused when much is asked."""

import asyncio
import base64
import json
import socket
import time

import httpx
import openai
import pytest

from kvtrain.inference.engine import Limits
from tests.inference.server.servers import KEY, model_of, serve, tokenizer_with, until

TEXT = {"model": "small", "prompt": "x"}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
# Route, what the body has besides, status, field, words of the message.
REFUSED = [
    ("completions", {"model": "other"}, 400, "model", "no model 'other' is served here; ask for 'small'"),
    ("completions", {"model": None}, 400, "model", "model: Input should be a valid string"),
    ("completions", {"tempature": 1}, 400, "tempature", "unknown field 'tempature'. Did you mean 'temperature'?"),
    ("completions", {"temperature": "1"}, 400, "temperature", "should be a valid number"),
    ("completions", {"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
    ("completions", {"temperature": float("nan")}, 400, "temperature", "finite number"),
    ("completions", {"top_p": 0}, 400, "top_p", "greater than 0"),
    ("completions", {"presence_penalty": -3}, 400, "presence_penalty", "greater than or equal to -2"),
    ("completions", {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ("completions", {"max_tokens": True}, 400, "max_tokens", "valid integer"),
    ("completions", {"max_tokens": 3001}, 413, "max_tokens", "comes to 3,001 tokens, above the 3,000"),
    ("completions", {"seed": -1}, 400, "seed", "greater than or equal to 0"),
    ("completions", {"n": 5}, 400, "n", "n must be at most 4 here, not 5"),
    ("completions", {"logprobs": 6}, 400, "logprobs", "logprobs must be at most 5 here, not 6"),
    ("completions", {"prompt": ""}, 400, "prompt", "give at least one character or token"),
    ("completions", {"prompt": []}, 400, "prompt", "give at least one character or token"),
    ("completions", {"prompt": [1, "x"]}, 400, "prompt", "give a text, a list of texts, token ids"),
    ("completions", {"prompt": "\ud800"}, 400, "prompt", "whole characters"),
    ("completions", {"prompt": [4096]}, 400, "prompt", "prompt holds 4096; tokens of this model are 0 to 4095"),
    ("completions", {"prompt": ["x"] * 129}, 400, "prompt", "129 prompts are more than 128"),
    ("completions", {"prompt": [3] * 201}, 413, "prompt", "comes to 201 tokens, above the 200"),
    ("completions", {"stop": ["x"] * 10**6}, 400, "stop", "at most 16 items"),
    ("completions", {"stop": ["x" * 257]}, 400, "stop.0", "at most 256 characters"),
    ("completions", {"stop": ""}, 400, "stop.0", "at least 1 character"),
    ("completions", {"logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is no token id"),
    ("completions", {"logit_bias": {"9999": 1}}, 400, "logit_bias", "logit_bias holds 9999"),
    ("completions", {"logit_bias": {"5": 101}}, 400, "logit_bias", "between -100 and 100"),
    ("completions", {"echo": True}, 400, "echo", "not offered here"),
    ("completions", {"best_of": 2}, 400, "best_of", "ask for n answers instead"),
    ("completions", {"stream_options": {"usage": True}}, 400, "stream_options.usage", "unknown field 'usage'"),
    ("chat/completions", {"tools": [{}]}, 400, "tools", "not offered here"),
    ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format", "not offered here"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
    ("chat/completions", {"messages": [{"role": "you", "content": "x"}]}, 400, "messages.0.role", "'system'"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content", "is missing"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages.0.content", "others are not read"),
    ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "wants logprobs: true"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 6}, 400, "logprobs", "at most 5"),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict():
    limits = Limits(
        max_requests=2, step_tokens=32, max_queue=4, max_n=4, max_logprobs=5, max_new_tokens=3000, max_prompt_tokens=200
    )
    options = {"body_timeout": 0.5, "max_body_bytes": 6 << 20, "max_connections": 6}
    with serve(model_of("dmc"), tokenizer_with(), limits=limits, **options) as served:
        yield served


@pytest.fixture
def http(strict):
    """A plain client; whatever was refused, the next good request is answered."""
    with httpx.Client(base_url=strict.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http
        assert http.post("/v1/completions", json=TEXT).status_code == 200


def at_work(engine):
    stats = engine.stats()
    return stats.running, stats.queued


def error_of(reply, status):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(("route", "fields", "status", "param", "words"), REFUSED)
def test_what_is_refused_names_the_field_and_the_remedy(http, route, fields, status, param, words):
    body = json.dumps({**(TEXT if route == "completions" else CHAT), **fields})
    reply = http.post(f"/v1/{route}", content=body, headers={"content-type": "application/json"})
    error = error_of(reply, status)
    assert error["param"] == param and words in error["message"]
    assert len(error["message"]) <= 501


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model": ' * 50_000, "nested too deeply"),
        ("9" * 10_000, "cannot be read"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model": "\xff"}', "cannot be read"),
    ],
    ids=["cut", "empty", "list", "deep", "deeper", "digits", "bytes", "text"],
)
def test_bodies_that_are_no_json_objects(http, content, words):
    reply = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert words in error_of(reply, 400)["message"]


def test_what_has_no_effect_and_what_asks_for_nothing_is_accepted(http):
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "best_of": 1, "echo": False}
    assert http.post("/v1/completions", json={**TEXT, **ignored, "suffix": None, "stop": None}).status_code == 200
    asked = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "max_completion_tokens": 2}
    assert http.post("/v1/chat/completions", json={**CHAT, **asked}).json()["usage"]["completion_tokens"] <= 2


def test_the_official_client_raises_its_own_errors(strict):
    with strict.client() as client, pytest.raises(openai.BadRequestError, match="Did you mean 'top_p'") as caught:
        client.completions.create(extra_body={"topp": 1}, **TEXT)
    assert (caught.value.param, caught.value.code) == ("topp", "unknown_field")
    with strict.client(key="wrong") as client, pytest.raises(openai.AuthenticationError, match="the key is wrong"):
        client.models.list()


def test_every_route_but_health_wants_the_key(strict):
    with httpx.Client(base_url=strict.url) as http:
        for path in ("/v1/models", "/metrics", "/live", "/", "/page.js", "/page.json", "/openapi.json", "/nope"):
            for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                reply = http.get(f"{path}?api_key={KEY}", headers=headers)
                assert error_of(reply, 401)["code"] == "invalid_api_key" and KEY not in reply.text
                assert reply.headers["www-authenticate"] == "Bearer"
        assert error_of(http.post("/v1/completions", json=TEXT), 401)["message"].startswith("a key is needed")
        assert http.get("/health").json() == {"ok": True, "reason": None}
        asked = http.get("/", headers={"accept": "text/html"})
        assert asked.headers["www-authenticate"].startswith("Basic")  # a browser asks for a password
        password = base64.b64encode(f"me:{KEY}".encode()).decode()
        assert http.get("/", headers={"authorization": f"Basic {password}"}).status_code == 200
        for wrong in ("!", base64.b64encode(b"\xff\xfe").decode(), base64.b64encode(KEY.encode()).decode()):
            assert http.get("/", headers={"authorization": f"Basic {wrong}"}).status_code == 401


def test_without_a_key_no_name_but_its_own_is_answered():
    """A web page may point a name of its own at this machine, and then ask in a person's browser."""
    hosts = frozenset(["127.0.0.1", "localhost"])
    with serve(model_of("dmc"), tokenizer_with(), keys=(), allowed_hosts=hosts) as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == 200
        for host, status in (("localhost:80", 200), ("LOCALHOST", 200), ("evil.example:8000", 400), ("[::1]:5", 400)):
            assert httpx.get(f"{served.url}/v1/models", headers={"host": host}).status_code == status
        form = httpx.post(
            f"{served.url}/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"}
        )
        assert "content-type application/json" in error_of(form, 400)["message"]


def test_a_model_without_a_chat_template_says_what_to_do():
    with serve(model_of("dmc"), tokenizer_with(None)) as served, served.client() as client:
        with pytest.raises(openai.BadRequestError, match="--chat-template FILE") as caught:
            client.chat.completions.create(**CHAT)
        assert caught.value.code == "no_chat_template"
    refusing = "{{ raise_exception('roles must alternate') }}"
    with (
        serve(model_of("dmc"), tokenizer_with(refusing)) as served,
        served.client() as client,
        pytest.raises(openai.BadRequestError, match="roles must alternate"),
    ):
        client.chat.completions.create(**CHAT)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(http, announced):
    content = b"x" * (7 << 20)
    chunks = content if announced else (content[at : at + (1 << 16)] for at in range(0, len(content), 1 << 16))
    error = error_of(http.post("/v1/completions", content=chunks), 413)
    assert error["message"] == "the body is above 6,291,456 bytes; shorten it"


def test_a_body_that_comes_too_slowly(strict, http):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(strict.url.rpartition(":")[2])), timeout=10) as slow:
        slow.sendall(head.encode() + b"{")
        answer = b""
        while part := slow.recv(4096):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b"had not arrived after 0.5 seconds" in answer


def test_more_than_is_served_at_a_time(strict, http):
    """Two run, four wait, and the next one is told to come again; so is the seventh connection."""
    body = {**TEXT, "max_tokens": 3000, "ignore_eos": True, "temperature": 0}

    async def crowd():
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=strict.url, headers=headers, timeout=60) as client:
            tasks = []
            for n, stands in ((2, (2, 0)), (4, (2, 4))):
                tasks.append(asyncio.create_task(client.post("/v1/completions", json={**body, "n": n})))
                await asyncio.to_thread(until, lambda stands=stands: stands == at_work(strict.engine))
            full = await client.post("/v1/completions", json=body)
            tasks += [asyncio.create_task(client.get("/live", timeout=60)) for _ in range(4)]
            await asyncio.sleep(0.3)
            many, health = await client.get("/v1/models"), await client.get("/health")
            for task in tasks:
                task.cancel()
            return full, many, health

    full, many, health = asyncio.run(crowd())
    assert error_of(full, 429)["code"] == "queue_full" and full.headers["retry-after"] == "1"
    assert error_of(many, 429)["code"] == "too_many_connections" and many.headers["retry-after"] == "1"
    assert health.status_code == 200
    until(lambda: at_work(strict.engine) == (0, 0))


def test_a_request_that_never_fits_is_told_both_figures():
    with serve(model_of("full"), tokenizer_with(), budget=200_000) as served, served.client() as client:
        with pytest.raises(
            openai.APIStatusError, match=r"take about [\d,]+ bytes of cache, above the budget of 200,000"
        ):
            client.completions.create(**{**TEXT, "max_tokens": 2500})
        assert client.completions.create(**TEXT).usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_shuts_down_says_so(stream):
    with serve(model_of("dmc"), tokenizer_with()) as served, served.client() as client:
        asked = {**TEXT, "max_tokens": 3000, "temperature": 0, "extra_body": {"ignore_eos": True}}

        async def ask():
            task = asyncio.create_task(asyncio.to_thread(_outcome, client, stream, asked))
            await asyncio.to_thread(until, lambda: served.engine.stats().running == 1)
            await asyncio.to_thread(served.engine.close)
            return await task

        error = asyncio.run(ask())
        assert "the engine shut down before the answer was complete" in str(error)
        assert stream or error.status_code == 503
        with pytest.raises(openai.InternalServerError, match="the engine shuts down") as caught:
            client.completions.create(**TEXT)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        health = httpx.get(f"{served.url}/health")
        assert health.status_code == 503 and health.json()["ok"] is False


def _outcome(client, stream, asked):
    with pytest.raises(openai.APIError) as caught:
        list(client.completions.create(stream=stream, **asked))
    return caught.value


def test_an_engine_that_dies_answers_everyone(monkeypatch):
    from kvtrain.inference.engine.loop import EngineLoop

    with serve(model_of("dmc"), tokenizer_with()) as served, served.client() as client:
        monkeypatch.setattr(EngineLoop, "step", lambda loop: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the engine has died of ZeroDivisionError") as caught:
            client.completions.create(**TEXT)
        assert caught.value.status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 503
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="has died"):
            client.completions.create(**TEXT)
        assert time.monotonic() - began < 5


def test_an_engine_that_dies_ends_streams_after_what_they_had(monkeypatch):
    """With the reason, and at once."""
    from kvtrain.inference.engine.loop import EngineLoop

    with serve(model_of("dmc"), tokenizer_with()) as served, served.client() as client:
        choose, left = EngineLoop._choose, [5]

        def breaking(loop, *asked):
            choose(loop, *asked)  # its events have not crossed yet
            left[0] -= 1
            assert left[0], "the device is lost"

        monkeypatch.setattr(EngineLoop, "_choose", breaking)
        asked = {**TEXT, "max_tokens": 3000, "logprobs": 0, "extra_body": {"ignore_eos": True}}
        parts = []
        with pytest.raises(openai.APIError, match="the engine has died of AssertionError: the device is lost"):
            parts.extend(part for part in client.completions.create(stream=True, **asked))
        assert sum(len(part.choices[0].logprobs.tokens) for part in parts) == 5
