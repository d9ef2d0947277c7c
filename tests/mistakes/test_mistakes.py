"""Every mistake is answered in a line: exit code 2, no traceback, nothing left behind.

Each case is a command line and words of the answer; the tables hold them, ``place.py`` the files that they name.
"""

import shlex

import pytest
import torch

from kvtrain_cli import main

from . import chat_table, command_table, model_table, recipe_table, trainer_table
from .place import build, snapshot

MOST_LINES = 3
_GOOD, _RETROFIT = "fit --config good.yaml", "fit --config retrofit.yaml"
_ZERO = (
    f"{_GOOD} --trainer.strategy "
    "'{{class_path: kvtrain.training.strategies.DeepSpeedZeRO, init_args: {{config: {}}}}}'"
)
_CHATS = "--tokenizer kvtrain:copy --chat-template configs/chat_templates/plain.jinja --output out"
_COMMANDS = (
    *("OUTER", "VALIDATE", "ESTIMATE", "PREPARE", "EXPORT", "PUSH"),
    *("GENERATE", "SERVE", "EVAL", "METHOD", "REPORT"),
)
CASES = [
    *recipe_table.FILES,
    *((f"{_GOOD} {options}", words) for options, words in recipe_table.WORDS),
    *((f"{_GOOD} {options}", words) for options, words in trainer_table.TRAINER),
    *((_ZERO.format(file), words) for file, words in trainer_table.ZERO),
    *((f"{_GOOD} {options}", words) for options, words in [*model_table.DATA, *model_table.MODEL]),
    *((f"{_RETROFIT} {options}", words) for options, words in model_table.RETROFIT),
    *((f"fit --config chat.yaml {options}", words) for options, words in chat_table.DATA),
    *((f"prepare {_CHATS} {options}", words) for options, words in chat_table.PREPARE),
    *(case for name in _COMMANDS for case in getattr(command_table, name)),
]
# What would tell Lightning of other nodes, or the Hub of a user.
_SURROUNDINGS = ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "HF_TOKEN", "KVTRAIN_DEBUG", "KVTRAIN_API_KEY")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The working directory, the same for all: no case changes it."""
    folder = tmp_path_factory.mktemp("mistakes")
    build(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
        for name in _SURROUNDINGS:
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        main(["fit", "--config", "nowhere.yaml"])  # what libraries say when they are first imported is not asked here
        yield folder
    if torch.distributed.is_initialized():  # where a strategy was refused, which ends a process of its own
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def contents(place):
    """What the directory holds."""
    return snapshot(place)


@pytest.fixture
def untouched(place, contents):
    """Fails where a case has written anything, and blames no other for it."""
    yield
    before = dict(contents)
    contents.clear()
    contents.update(snapshot(place))
    assert contents == before


def test_there_are_enough():
    lines = [line for line, _ in CASES]
    assert len(lines) == len(set(lines)) >= 500


@pytest.mark.parametrize(("line", "words"), CASES, ids=[ascii(line)[1:-1] for line, _ in CASES])
@pytest.mark.usefixtures("untouched")
def test_a_mistake_is_answered_in_a_line(capsys, line, words):
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip("\n").split("\n")  # a progress bar is one line, however often it is drawn
    assert lines[-1].startswith("kvtrain: error: ")
    assert words in lines[-1]
    assert len(lines) <= MOST_LINES
    assert "Traceback" not in captured.err
    assert captured.out.strip() == ""
