"""vLLM's own server over an exported folder, as it is started from a shell."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm.folders import NEW_TOKENS, folder, prompts
from tests.vllm.jobs import check_tokens

PATIENCE = 200  # seconds, on a machine that may be busy


@pytest.fixture
def server(tmp_path):
    """The address of a server over cla2, which is stopped by its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder("cla2")]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-num-seqs", "8"]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ})
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(address, process, log)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) is not None


def _wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-4000:])


def test_many_ask_at_once_and_metrics_tell_the_blocks(server):
    def ask(prompt: list[int]) -> list[int]:
        body = {"model": "m", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        data = json.dumps({**body, "return_token_ids": True}).encode()
        request = urllib.request.Request(f"{server}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as pool:
        check_tokens("cla2", list(pool.map(ask, prompts())))
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as reply:
        metrics = reply.read().decode()
    assert 'num_gpu_blocks="1365"' in metrics
