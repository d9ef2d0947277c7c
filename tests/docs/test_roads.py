"""Every other page, from the first command to the last, in the order of the site and in one folder."""

import json

import pytest

from tests.docs.pages import DOCS, ROOT, navigation
from tests.docs.reader import Reader

pytestmark = pytest.mark.roads

FAST = ("python.md",)  # by test_readers.py
ROADS = [name for name in navigation() if name not in FAST and not name.startswith("reference/")]


def test_pages_are_followed(tmp_path, monkeypatch, capsys):
    """Whoever begins in an empty folder with text of their own gets through all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVTRAIN_API_KEY", raising=False)
    reader = Reader(tmp_path, capsys)
    ran = {name: reader.follow(DOCS / name) for name in ROADS}
    retrofit = ["recipes", "prepare", "estimate", "check", "fit", "validate", "report"]
    assert ran["retrofit.md"] == [*retrofit, "export", "eval", "eval", "generate", "serve", "estimate", "estimate"]
    assert set(ran["serve.md"]) == {"serve"} and set(ran["hub.md"]) == {"push"}
    assert {"prepare", "fit", "export", "estimate"} == set(ran["chats.md"])
    assert (tmp_path / "runs/mine/report/report.html").is_file()
    assert (tmp_path / "comparison/comparison.html").is_file()
    assert json.loads((tmp_path / "exported/mine/config.json").read_text())["model_type"] == "kvtrain"
    assert (tmp_path / "exported/lora-dmc-adapter/adapter/adapter_config.json").is_file()
    assert not (ROOT / "runs" / "mine").exists()
