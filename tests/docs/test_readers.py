"""The README and what stands in Python, run as they stand."""

import re
import shutil

import pytest

from tests.docs.pages import DOCS, README, ROOT
from tests.docs.reader import Reader


@pytest.fixture
def reader(tmp_path, monkeypatch, capsys):
    """Someone with a checkout."""
    for name in ("recipes", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVTRAIN_API_KEY", raising=False)
    return Reader(tmp_path, capsys)


def test_the_readme_runs(reader):
    names = ["recipes", "estimate", "fit", "report", "export", "eval", "generate", "eval"]
    assert reader.follow(README) == names
    assert (reader.folder / "exported/dmc-tiny/model.safetensors").is_file()
    assert (reader.folder / "runs/dmc-tiny/report/report.html").is_file()


def test_python_runs(reader):
    assert reader.follow(DOCS / "python.md") == []
    assert re.match(r"\d+ tensor", reader.said)
