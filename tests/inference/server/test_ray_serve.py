"""Two replicas under Ray Serve answer as one server would, and one that dies takes its own requests along alone."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from kvtrain.inference.load import open_model
from tests.inference.server.servers import KEY, model_of, tokenizer_with, until
from tests.inference.server.test_load import ask, conversations

ABSENT = "needs Ray Serve: pip install 'kvtrain[cluster]'"
FILE = Path(__file__).resolve().parents[3] / "launch" / "serve" / "ray.yaml"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def replicas(mark):
    """Processes of this test's replicas: what Ray starts inherits its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = mark.encode() in (process / "environ").read_bytes()
            if ours and (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                found.append(int(process.name))
    return found


def ready(url):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"}, timeout=5).status_code == 200
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """``serve run`` of the file that users get: its address, what marks its processes, and what answers shall be."""
    pytest.importorskip("ray.serve", reason=ABSENT)
    folder = tmp_path_factory.mktemp("ray")
    model_of("dmc").save_pretrained(folder / "small")
    tokenizer_with().save_pretrained(folder / "small")
    model, tokenizer = open_model(str(folder / "small"))
    expected = conversations(tokenizer, model)
    asked, port = yaml.safe_load(FILE.read_text()), free_port()
    asked["http_options"]["port"] = port
    (application,) = asked["applications"]
    application["args"] |= {"model": str(folder / "small"), "budget": "64MiB", "max_requests": 16}
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 0}}
    (folder / "ray.yaml").write_text(yaml.safe_dump(asked))
    mark = secrets.token_hex(16)
    environment = {**os.environ, "KVTRAIN_API_KEY": KEY, "RAY_USAGE_STATS_ENABLED": "0", "KVTRAIN_TEST": mark}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [Path(sys.executable).with_name("serve"), "run", folder / "ray.yaml"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: ready(url) and len(replicas(mark)) == 2, 120)
            yield url, mark, expected
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert KEY not in (folder / "log").read_text()


async def ask_all(url, expected, count, meanwhile=None):
    """How each of many answers, streamed and not, compares to ``generate``: right, wrong, or an error."""

    async def come(number, client):
        prompt, tokens, text = expected[number % len(expected)]
        try:
            return "right" if await ask(client, prompt, tokens, number % 2 == 0, None) == text else "wrong"
        except (httpx.HTTPError, AssertionError):
            return "error"

    async def act():
        if meanwhile is not None:
            await asyncio.sleep(0.3)
            meanwhile()

    headers, limits = {"authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120) as client:
        outcomes = await asyncio.gather(*(come(number, client) for number in range(count)), act())
    return outcomes[:-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"model": "kvtrain:tiny"}, "", "Ray Serve needs a key: KVTRAIN_API_KEY"),
        ({"model": "kvtrain:tiny"}, "short", "at least 16 ASCII characters"),
        ({"budget": "1GiB"}, KEY, "args.model is missing"),
        ({"model": "kvtrain:tiny", "budgt": "1GiB"}, KEY, "unknown option '--budgt'. Did you mean '--budget'"),
        ({"model": "kvtrain:tiny", "port": 1}, KEY, "unknown option '--port'"),
        ({"model": "kvtrain:tiny", "max_requests": 0}, KEY, "--max-requests must be at least 1"),
        ({"model": "kvtrain:tiny", "chat_template": "nowhere"}, KEY, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_a_replica_starts(options, key, message, monkeypatch):
    ray_serve = pytest.importorskip("kvtrain.inference.server.ray_serve", reason=ABSENT, exc_type=ImportError)
    monkeypatch.setenv("KVTRAIN_API_KEY", key)
    with pytest.raises((ValueError, OSError), match=message):
        ray_serve.build(options)


@pytest.mark.slow
def test_a_replica_is_the_server_s_own_application(monkeypatch):
    ray_serve = pytest.importorskip("kvtrain.inference.server.ray_serve", reason=ABSENT, exc_type=ImportError)
    monkeypatch.setenv("KVTRAIN_API_KEY", KEY)
    replica, made = ray_serve.Replica({"model": "kvtrain:tiny", "budget": "16MiB", "name": "small"}), []
    monkeypatch.setattr("kvtrain.inference.server.app.build_app", lambda *given: made.append(given) or "the app")
    assert replica.__serve_build_asgi_app__() == "the app"
    ((engine, settings),) = made
    assert (settings.model_name, settings.keys) == ("small", (KEY,)) and engine.health().ok
    replica.check_health()
    engine.close()
    with pytest.raises(RuntimeError, match="shuts down"):
        replica.check_health()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_requests_are_answered_as_by_one_model(cluster):
    url, _, expected = cluster
    outcomes = asyncio.run(ask_all(url, expected, 100))
    assert outcomes == ["right"] * 100
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/health").json() == {"ok": True, "reason": None}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_replica_that_dies_fails_its_own_requests(cluster):
    url, mark, expected = cluster
    until(lambda: len(replicas(mark)) == 2, 60)
    before = replicas(mark)
    outcomes = asyncio.run(ask_all(url, expected, 100, lambda: os.kill(before[0], signal.SIGKILL)))
    print({outcome: outcomes.count(outcome) for outcome in outcomes})
    assert "wrong" not in outcomes and outcomes.count("right") >= 40 and "error" in outcomes
    assert asyncio.run(ask_all(url, expected, 10)) == ["right"] * 10
    until(lambda: len(replicas(mark)) == 2 and set(replicas(mark)) != set(before), 60)  # another takes its place
    assert asyncio.run(ask_all(url, expected, 20)) == ["right"] * 20
