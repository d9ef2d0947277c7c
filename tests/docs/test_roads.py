"""Every other page, from its first command to its last, in the folder of someone who began with text of their own."""

import json

import pytest

from tests.docs.pages import DOCS, ROOT, navigation
from tests.docs.reader import Reader

pytestmark = [pytest.mark.roads, pytest.mark.timeout(900)]  # beside other work

FIRST, FAST = "retrofit.md", ("python.md",)  # which test_readers.py follows
OTHERS = [name for name in navigation() if name not in (FIRST, *FAST) and not name.startswith("reference/")]
# Commands of a page, each once, in the order of their first uses.
NAMES = {
    "retrofit.md": "recipes prepare estimate check fit validate report export eval generate serve",
    "choose.md": "eval generate",
    "chats.md": "prepare fit export generate estimate",
    "machines.md": "estimate recipes",
    "evaluate.md": "eval report",
    "serve.md": "serve",
    "hub.md": "push",
}
LEAVES = {
    "retrofit.md": ("runs/mine/report/report.html", "exported/mine/model.safetensors"),
    "chats.md": ("chat-shards/samples.html", "exported/lora-dmc-adapter/adapter/adapter_config.json"),
    "machines.md": ("launch/torchrun.sh",),
    "evaluate.md": ("comparison/comparison.html", "runs/mine/eval.json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Empty at first."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture
def reader(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KVTRAIN_API_KEY", raising=False)
    return Reader(folder, capsys)


def follow(reader: Reader, name: str) -> None:
    ran = reader.follow(DOCS / name)
    assert list(dict.fromkeys(ran)) == NAMES.get(name, "").split()
    assert [path for path in LEAVES.get(name, ()) if not (reader.folder / path).is_file()] == []


def test_whoever_begins_in_an_empty_folder_gets_through(reader):
    follow(reader, FIRST)
    assert json.loads((reader.folder / "exported/mine/config.json").read_text())["method_config"]["name"] == "dmc"
    assert not (ROOT / "runs" / "mine").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_a_page_is_followed_from_there(reader, name):
    if not (reader.folder / "exported" / "mine").exists():  # asked for alone
        reader.follow(DOCS / FIRST)
    follow(reader, name)
