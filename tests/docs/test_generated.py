"""What of docs/ follows from the code, and the notebook's cells."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvtrain.data.module import PackedDataModule
from kvtrain.help import DOCS, documents
from kvtrain.help.notebook import notebook
from kvtrain.help.reference import settings_of
from kvtrain.models.registry import methods
from kvtrain.recipes import list_recipes
from kvtrain.training import DMCModule
from tests.docs import families
from tests.docs.pages import ROOT
from tests.docs.reader import check_options, shortened

NOTEBOOK = DOCS / "retrofit_your_model.ipynb"


def cells(text: str) -> list[str]:
    """Sources of the cells that run."""
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def test_documents_follow_from_the_code():
    for name, text in documents().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"run `python -m kvtrain.help` to write {name} again"


def test_what_families_do_under_methods_has_been_tried():
    told = "run `python -m tests.docs.families` to write it again"
    assert families.PAGE.read_text(encoding="utf-8") == families.page(), told


def test_the_reference_has_everything():
    pages = {path.name: path.read_text() for path in (DOCS / "reference").glob("*.md")}
    assert all(f"## kvtrain.{kind.__name__}\n" in pages["methods.md"] for kind in methods().values())
    recipes = [one.path.relative_to(ROOT) for one in list_recipes()]
    assert all(f"### {path}\n" in pages["recipes.md"] for path in recipes)
    assert all(text in pages["cli.md"] for text in ("--train-tokenizer VOCAB", "--trainer.non_finite", "--grace S"))
    lines = (pages["methods.md"] + pages["settings.md"]).splitlines()
    assert [line for line in lines if line.endswith("|  |")] == []  # what nobody describes


def test_settings_are_those_of_a_class_and_its_bases():
    module = {name: (default, meaning) for name, default, meaning in settings_of(DMCModule)}
    assert module["base"][0] == "required" and module["noisy_finetune"][0] == "`True`"
    assert module["weight_decay"] == ("`0.1`", "On matrices; vectors and embeddings have none.")
    assert "training" not in module and len(module) > 10
    data = {name: default for name, default, _ in settings_of(PackedDataModule)}
    assert data["corpus"] == "`'stdlib'`"


def test_a_page_becomes_a_notebook():
    page = '# A\nb\n```bash\nls\n\npwd\n```\n```yaml\nc: 1\n```\n```yaml title="d.yaml"\nd: 2\n```\n'
    page += '```python\ne = 3\n```\n```bash title="until Ctrl-C"\nf\n```\n'
    content = json.loads(notebook(page, "a.md", "g"))
    kinds = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
    assert kinds[3:] == [
        ("markdown", "b"),
        ("code", "!ls\n!pwd"),
        ("markdown", "```yaml\nc: 1\n```"),
        ("code", "%%writefile d.yaml\nd: 2"),
        ("code", "e = 3"),
        ("markdown", '```bash title="until Ctrl-C"\nf\n```'),
    ]
    assert all(cell["outputs"] == [] for cell in content["cells"] if cell["cell_type"] == "code")


def test_cells_of_the_notebook_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = cells(NOTEBOOK.read_text())
    assert len(found) > 10
    for cell in found:
        commands = [shlex.split(line[1:]) for line in cell.splitlines() if line.startswith("!")]
        if commands:
            assert len(commands) == len(cell.splitlines())
            for program, name, *words in commands:
                assert program == "kvtrain"
                if name not in ("fit", "validate", "estimate", "check"):  # whose recipes lie in the reader's folder
                    check_options(name, words)
        elif not cell.startswith("%%writefile "):
            compile(cell, NOTEBOOK.name, "exec")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cell by cell, as a kernel would: commands in processes of their own, Python in one namespace."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    namespace: dict = {}
    for cell in cells(NOTEBOOK.read_text()):
        if cell.startswith("%%writefile "):
            name, _, text = cell.removeprefix("%%writefile ").partition("\n")
            Path(name).write_text(text)
        elif cell.startswith("!"):
            for line in cell.splitlines():
                words = shortened(shlex.split(line[1:])[1:])
                program = [sys.executable, str(ROOT / "kvtrain_cli.py"), *words]
                done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
                assert done.returncode == 0, f"{line}\n{done.stderr}"
        else:
            exec(compile(cell, NOTEBOOK.name, "exec"), namespace)
    assert (tmp_path / "retrofit_my_model/exported/mine/config.json").is_file()
    assert namespace["model"].method.name == "dmc"
