"""Whatever a client sends is answered with a reason, never with an error of the server, and the next one is served."""

import contextlib
import json
import socket

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.inference.server.servers import KEY, model_of, serve, tokenizer_with

pytestmark = pytest.mark.roads
HEADERS = {"authorization": f"Bearer {KEY}"}
EXAMPLES = 100


@pytest.fixture(scope="module")
def hostile():
    with serve(model_of("dmc"), tokenizer_with(), body_timeout=1.0) as served:
        yield served


def require_alive(served):
    body = {"model": "small", "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{served.url}/v1/completions", json=body, headers=HEADERS, timeout=30).status_code == 200


def require_reason(reply):
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400 and reply.request.method != "HEAD":
        error = reply.json()["error"]
        assert error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models/{name}"])
@pytest.mark.parametrize("near", [False, True])
def test_what_the_description_allows_and_forbids(hostile, path, near):
    """From the server's own description; ``near`` names the model and asks for little, so that more is accepted."""
    schema = schemathesis.openapi.from_url(f"{hostile.url}/openapi.json", headers=HEADERS)
    operation = schema[path]["GET" if "{" in path else "POST"]
    statuses = set()

    @settings(
        max_examples=EXAMPLES // 2, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def run(case):
        if near and isinstance(case.body, dict):
            case.body |= {
                "model": "small",
                "max_tokens": 3,
                "n": 1,
                "prompt" if path == "/v1/completions" else "x": "x",
            }
            case.body.pop("x", None)
            case.body.pop("max_completion_tokens", None)
        with httpx.Client(base_url=hostile.url, headers=HEADERS, timeout=60) as client:
            content = json.dumps(case.body) if isinstance(case.body, dict | list) else None
            target = case.formatted_path
            headers = {"content-type": "application/json"}
            reply = client.request(case.method, target, content=content, headers=headers)
        require_reason(reply)
        statuses.add(reply.status_code)

    run()
    require_alive(hostile)
    assert statuses <= {200, 400, 404, 405, 413}
    assert 200 in statuses or not near or "{" in path


def raw(served, content, patience=20):
    """What the server sends back first."""
    answer = b""
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=patience) as connection:
        with contextlib.suppress(OSError):  # it may close before all is sent
            connection.sendall(content)
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n\r\n" not in answer and (part := connection.recv(65536)):
                answer += part
    return answer


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()


@pytest.mark.parametrize(
    ("content", "statuses"),
    [
        (HEAD + b"".join(b"x-%d: y\r\n" % number for number in range(20_000)) + b"\r\n", (b"400", b"431")),
        (HEAD + b"x: " + b"y" * (1 << 21) + b"\r\n\r\n", (b"400", b"431")),
        (b"GET /" + b"y" * (1 << 21) + b" HTTP/1.1\r\n\r\n", (b"400", b"414", b"431")),
        (HEAD + b"Content-Length: -5\r\n\r\n", (b"400",)),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", (b"400",)),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (b"400",)),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n", (b"400", b"")),
        (b"\x00\x01\x02\r\n\r\n", (b"400",)),
        (b"GET /v1/models?api_key=" + KEY.encode().replace(b" ", b"+") + b" HTTP/1.1\r\nHost: x\r\n\r\n", (b"401",)),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Basic \xff\xfe\r\n\r\n", (b"400", b"401")),
    ],
    ids=["headers", "header", "path", "negative", "two", "both", "chunks", "noise", "url", "basic"],
)
def test_what_is_hardly_http(hostile, content, statuses):
    answer = raw(hostile, content)
    assert answer[9:12] in statuses, answer[:200]
    assert b"Traceback" not in answer and KEY.encode() not in answer
    require_alive(hostile)


def test_fifty_slow_bodies_hold_nobody_up(hostile):
    port, connections = int(hostile.url.rpartition(":")[2]), []
    for _ in range(50):
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        connection.sendall(HEAD + b"Content-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
        connections.append(connection)
    require_alive(hostile)
    for connection in connections:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        connection.close()
    require_alive(hostile)


@pytest.mark.parametrize("announced", [True, False])
def test_a_hundred_mebibytes(hostile, announced):
    content = b"x" * (100 << 20)
    chunks = content if announced else (content[at : at + (1 << 20)] for at in range(0, len(content), 1 << 20))
    reply = httpx.post(f"{hostile.url}/v1/completions", content=chunks, headers=HEADERS, timeout=60)
    assert reply.status_code == 413
    require_reason(reply)
    require_alive(hostile)
