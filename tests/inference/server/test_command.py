"""``kvtrain serve``: where it listens, what it calls things, and how signals end it."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from kvtrain.cli import main
from kvtrain.inference.server.command import API_KEY
from kvtrain.parser import num_bytes
from tests.inference.server.servers import TEMPLATE, until

SERVE = ["serve", "kvtrain:copy", "--budget", "16MiB"]
KEY = "a key of many characters"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def healthy(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def serve_while(visit, *arguments):
    """Run the command in this thread and a visit in another one, which SIGTERM ends; the exit code and its finding."""
    port, found = free_port(), []

    def come():
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: healthy(url))
            found.append(visit(url))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=come)
    visitor.start()
    code = main([*SERVE, "--port", str(port), *arguments])
    visitor.join()
    return code, found[0]


def test_it_serves_until_a_signal_comes(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(API_KEY, raising=False)
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)

    def visit(url):
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        asked = {"model": "mine", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
        too_long = httpx.post(f"{url}/v1/chat/completions", json={**asked, "max_tokens": 9}).status_code
        foreign = httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code
        return names, httpx.post(f"{url}/v1/chat/completions", json=asked).status_code, too_long, foreign

    options = ["--name", "mine", "--chat-template", str(template), "--max-tokens", "8", "--max-requests", "600"]
    code, found = serve_while(visit, *options)
    assert (code, found) == (143, (["mine"], 200, 413, 400))
    captured = capsys.readouterr()
    assert "kvtrain: mine at http://127.0.0.1:" in captured.out and "open to this machine" in captured.out
    assert "SIGTERM: no new requests, running ones have 30 seconds" in captured.err


@pytest.mark.parametrize("from_file", [True, False])
def test_keys_come_from_a_file_or_the_environment_and_are_not_shown(capfd, monkeypatch, tmp_path, from_file):
    (tmp_path / "keys").write_text(f"\n  {KEY}  \nanother key of many characters\n")
    monkeypatch.setenv(API_KEY, "the file goes before" if from_file else KEY)

    def visit(url):
        keys = (KEY, "another key of many characters", "the file goes before")
        return [httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code for key in keys]

    options = ["--host", "0.0.0.0", *(["--api-key-file", str(tmp_path / "keys")] if from_file else [])]
    assert serve_while(visit, *options) == (143, [200, 200 if from_file else 401, 401])
    captured = capfd.readouterr()
    assert "a key opens it" in captured.out and "characters" not in captured.out + captured.err


def test_a_taken_port_is_said_before_the_model_is_read(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 2
    words = f"kvtrain: error: 127.0.0.1 port {port} cannot be had (Address already in use); choose another --port"
    assert capsys.readouterr().err.startswith(words)


def test_missing_packages_are_named_with_the_remedy(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openai", "uvicorn") else find(name))
    assert main(SERVE) == 2
    assert capsys.readouterr().err == "kvtrain: error: serving needs uvicorn, openai; pip install 'kvtrain[serve]'\n"


def test_sizes():
    sizes = ("4GiB", "1.5 KiB", "2MB", "700", "0.5GiB")
    assert [num_bytes(text) for text in sizes] == [4 << 30, 1536, 2_000_000, 700, 1 << 29]
    for text in ("4gib", "", "GiB", "-1", "1e3", "4 G", "9" * 400):
        with pytest.raises(ValueError, match="is no size"):
            num_bytes(text)


@pytest.mark.roads
def test_the_rest_of_the_command_line_imports_none_of_it():
    program = (
        "import sys, kvtrain, kvtrain.cli; from kvtrain.inference.load import open_model\n"
        "kvtrain.cli.main(['generate', 'kvtrain:copy', '--prompt', 'x', '--max-new-tokens', '1'])\n"
        "print(sorted({'fastapi', 'uvicorn', 'prometheus_client', 'openai'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def process(tmp_path):
    """A server of its own process, and its address."""
    port = free_port()
    options = ["--budget", "64MiB", "--port", str(port), "--grace", "1.5"]
    command = [sys.executable, "-m", "kvtrain_cli", "serve", "kvtrain:tiny", *options]
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until(lambda: healthy(f"http://127.0.0.1:{port}"), 120)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
    assert b"Traceback" not in (tmp_path / "log").read_bytes()


LONG = {"model": "kvtrain:tiny", "prompt": "import", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.mark.roads
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_running_requests_end_or_tells_them_why(process, number, code):
    """Short ones end as they would have, those that come are told, and after the grace time the rest fail."""
    process, url = process
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as long:
        lines = long.iter_lines()
        next(lines)
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 30}, timeout=60) as short:
            short_lines = short.iter_lines()
            next(short_lines)
            process.send_signal(number)
            until(lambda: not healthy(url), 10)
            late = httpx.post(f"{url}/v1/completions", json=LONG, timeout=10)
            rest = list(short_lines)
        assert late.status_code == 503 and "the engine shuts down" in late.text
        assert any('"finish_reason":"length"' in line for line in rest) and "data: [DONE]" in rest
        end = [line for line in lines if line]
    assert "the engine shut down before the answer was complete" in end[-2] and end[-1] == "data: [DONE]"
    assert process.wait(timeout=20) == code


@pytest.mark.roads
def test_a_signal_ends_it_also_where_nobody_reads_what_it_says():
    """Who started it may be gone."""
    port = free_port()
    command = [sys.executable, "-m", "kvtrain_cli", "serve", "kvtrain:copy", "--budget", "16MiB", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: healthy(f"http://127.0.0.1:{port}"), 120)
            process.stdout.close()
            process.stderr.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 143
        finally:
            process.kill()


@pytest.mark.roads
def test_a_second_signal_ends_it_at_once(process):
    process, url = process
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as long:
        lines = long.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: not healthy(url), 10)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143 and time.monotonic() - began < 1
