"""The README's commands and code, run as they stand."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from kvtrain_cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# A training of minutes becomes one of seconds; everything else runs as written.
SHORTENED = {
    "fit": "--trainer.max_steps 2 --trainer.log_every_n_steps 1 "
    "--data.sequence_length 128 --data.batch_size 2 --data.validation_rows 2",
    "eval": "--limit 4 --sequence-length 128",
    "generate": "--max-new-tokens 4",
}


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
    found = blocks("python")
    assert found
    for source in found:
        exec(compile(source, "README.md", "exec"), {})
    assert re.match(r"\d+ tensor", capsys.readouterr().out)


def test_commands_run(checkout, capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("kvtrain ")]
    assert [command.split()[1] for command in commands] == [
        "recipes",
        "estimate",
        "fit",
        "report",
        "export",
        "eval",
        "generate",
    ]
    for command in commands:
        arguments = shlex.split(command)[1:]
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
