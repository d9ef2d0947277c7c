"""The README's commands and code, run as they stand."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import kvtrain
from kvtrain_cli import main
from tests.hub.client import local_hub
from tests.hub.server import READER

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# A training of minutes becomes one of seconds; everything else runs as written.
SHORTENED = {
    "fit": "--trainer.max_steps 2 --trainer.log_every_n_steps 1 "
    "--data.sequence_length 128 --data.batch_size 2 --data.validation_rows 2",
    "eval": "--limit 4 --sequence-length 128",
    "generate": "--max-new-tokens 4",
}
CLIENT = "from openai import"  # begins the program that asks the server of the command before


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working directory with the recipes and configs of the repository."""
    for name in ("recipes", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run(checkout, capsys):
    found = [source for source in blocks("python") if CLIENT not in source]
    assert found
    for source in found:
        exec(compile(source, "README.md", "exec"), {})
    assert re.match(r"\d+ tensor", capsys.readouterr().out)


def serve(arguments, monkeypatch, capsys):
    """What the README's client prints beside the server, which SIGTERM ends."""
    monkeypatch.delenv("KVTRAIN_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (client,) = [source for source in blocks("python") if CLIENT in source]
    visitor = threading.Thread(target=ask, args=(client.replace("8000", port), int(port)))
    visitor.start()
    assert main([*arguments, "--port", port]) == 143, capsys.readouterr().err
    visitor.join()
    return capsys.readouterr().out


def push(arguments, checkout):
    """What the README pushes lies on a Hub then, and opens from there."""
    name = arguments[2]
    with local_hub(checkout) as hub:
        assert main(arguments) == 0
        assert "model.safetensors" in hub.repositories[name].commits[hub.repositories[name].branches["main"]]
        assert kvtrain.load(name, token=READER).method.name == "dmc"


def ask(client, port):
    """Run a client of the server once that is there, and then ask it to end."""
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        exec(compile(client, "README.md", "exec"), {})
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_commands_run(checkout, capsys, monkeypatch):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("kvtrain ")]
    assert [command.split()[1] for command in commands] == [
        "recipes",
        "estimate",
        "fit",
        "report",
        "export",
        "eval",
        "generate",
        "eval",
        "serve",
        "push",
    ]
    for command in commands:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "serve":
            assert "'compression': " in serve(arguments, monkeypatch, capsys)
            continue
        if arguments[0] == "push":
            push(arguments, checkout)
            continue
        assert main([*arguments, *SHORTENED.get(arguments[0], "").split()]) == 0, capsys.readouterr().err
    assert (checkout / "exported/dmc-tiny/model.safetensors").is_file()
    assert (checkout / "runs/dmc-tiny/report/report.html").is_file()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for block in blocks("bash") for word in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert named and named <= targets


def test_paths_that_the_tour_names_exist():
    for path in re.findall(r"`((?:kvtrain|recipes|tests|configs|launch)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
