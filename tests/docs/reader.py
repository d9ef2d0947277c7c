"""Someone who follows a page: writes its files, runs its commands and its Python, reads what needs another machine."""

import contextlib
import os
import re
import shlex
import signal
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

import kvtrain
from kvtrain.cli import COMMANDS, build_parser
from kvtrain.models.parse_method import parse_method
from kvtrain.training.cli import read_recipe
from kvtrain_cli import main
from tests.docs.pages import ROOT, Block, blocks
from tests.hub.client import local_hub
from tests.hub.server import READER

# A training of minutes becomes one of seconds; everything else runs as written.
ROWS = "--data.sequence_length 128 --data.batch_size 2 --data.validation_rows 2"
SHORTENED = {
    "fit": f"--trainer.max_steps 2 --trainer.log_every_n_steps 1 {ROWS}",
    "check": ROWS,
    "validate": "--data.validation_rows 2",
    "generate": "--max-new-tokens 4",
}
WINDOWS = ("perplexity", "continuation")  # tasks on windows of text, which may be short
CLIENT = "from openai import"  # begins the program that asks the server of the command before
OF_A_RECIPE = ("fit", "validate", "estimate", "check")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ARGUMENTS = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def shortened(words: list[str]) -> list[str]:
    """A command as it is run here."""
    if words[0] == "eval":
        task = words[words.index("--tasks") + 1]
        return [*words, *("--limit 4 --sequence-length 128" if task in WINDOWS else "--limit 2").split()]
    return [*words, *SHORTENED.get(words[0], "").split()]


def check(words: list[str]) -> None:
    """Read a command: its program is known, and so is everything that it is told.

    Raises:
        Exception: Something in it is not.
    """
    match words:
        case [assignment, *rest] if re.fullmatch(r"\w+=\S*", assignment):
            check(rest)
        case ["kvtrain", name, *rest]:
            check_options(name, rest)
        case ["make", target, *_]:
            assert target in TARGETS, target
        case ["pip", "install", *rest]:
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
                assert set(extra.split(",")) <= EXTRAS.keys(), extra
        case ["docker", "build", *rest]:
            named = [rest[place + 1].split("=")[0] for place, word in enumerate(rest) if word == "--build-arg"]
            assert set(named) <= set(ARGUMENTS) and rest[-1] == ".", rest
        case ["docker", "run", "--rm", _, *rest]:
            check(rest)
        case ["python", "-m", module, *_]:
            assert find_spec(module), module
        case ["vllm", "serve", folder, *_]:
            assert not folder.startswith("-"), folder
        case ["python", file, *_]:
            assert (ROOT / file).is_file(), file
        case _:
            raise ValueError(f"nobody knows the command {shlex.join(words)}")


def check_options(name: str, words: list[str]) -> None:
    """Parse the options of a command of ours, and the recipe that it names."""
    if name in OF_A_RECIPE:
        rest = words if COMMANDS[name].add_arguments is None else build_parser(name).parse_known_args(words)[1]
        named = [f"--config={words[place + 1]}" for place, word in enumerate(words) if word == "--config"]
        plain = [word for word in rest if word != "--config" and f"--config={word}" not in named]
        read_recipe([*named, *plain])
        return
    asked = build_parser(name).parse_args(words)
    if getattr(asked, "method", None):
        parse_method(asked.method)


class Reader:
    """Who follows pages in a folder.

    Args:
        folder: Where files and runs go; must be the working directory.
        capsys: Shows what a command says.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.said = ""  # by the commands and the Python of the last page

    def follow(self, page: Path) -> list[str]:
        """Do all that a page says; the commands that ran, by their names."""
        ran, recipe, text, self.said = [], "recipes/tiny/quickstart.yaml", page.read_text(), ""
        found = blocks(page)
        for place, block in enumerate(found):
            before = re.findall(r"recipes/tiny/\w+\.yaml", "\n".join(text.splitlines()[: block.line - 2]))
            recipe = before[-1] if before else recipe
            if block.file:
                (self.folder / block.file).write_text(block.text)
            if block.language == "yaml" and not block.part_of:
                self.lay_over(recipe, block)
            elif block.language == "bash":
                client = next((one.text for one in found[place + 1 :] if one.text.startswith(CLIENT)), None)
                ran += [name for words in block.commands() for name in self.run(words, block, client)]
            elif block.language == "python" and not (block.part_of or block.elsewhere or block.text.startswith(CLIENT)):
                exec(compile(block.text, str(block), "exec"), {})
        self.said += self.capsys.readouterr().out
        return ran

    def lay_over(self, recipe: str, block: Block) -> None:
        """Read a recipe with the block's settings in the place of its own."""
        changes = self.folder / "changes.yaml"
        changes.write_text(block.text)
        read_recipe([f"--config={recipe}", f"--config={changes}"])

    def run(self, words: list[str], block: Block, client: str | None) -> Iterator[str]:
        """Run a command of ours, or read what is no command of ours or needs another machine."""
        if block.elsewhere or words[0] != "kvtrain":
            check(words)
            return
        yield words[1]
        if words[1] == "serve":
            self.serve(words[1:], client)
        elif words[1] == "push":
            self.push(words[1:])
        else:
            code = main(shortened(words[1:]))
            captured = self.capsys.readouterr()
            assert code == 0, f"{block}: {shlex.join(words)}\n{captured.err}"
            self.said += captured.out

    def serve(self, arguments: list[str], client: str | None) -> None:
        """Serve until the client, or one that asks whether all is well, has ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        visitor = threading.Thread(target=visit, args=(port, client))
        visitor.start()
        code = main([*arguments, "--port", str(port)])
        visitor.join()
        captured = self.capsys.readouterr()
        assert code == 143, captured.err
        assert ("'compression': " if client else "'ok': True") in captured.out
        self.said += captured.out

    def push(self, arguments: list[str]) -> None:
        """What is pushed lies on a Hub then, and opens from there."""
        name = arguments[2]
        with local_hub(self.folder) as hub:
            assert main(arguments) == 0
            assert "model.safetensors" in hub.repositories[name].commits[hub.repositories[name].branches["main"]]
            assert kvtrain.load(name, token=READER).method.name == "dmc"


def visit(port: int, client: str | None) -> None:
    """Run a client of the server once that is there, and then ask it to end."""
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        if client:
            exec(compile(client.replace("8000", str(port)), "client", "exec"), {})
        else:
            print(httpx.get(f"http://127.0.0.1:{port}/health").json())
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
