"""vLLM finds the plugin by the package's entry point; nothing else of kvtrain needs vLLM, or brings it in."""

import ast
import importlib
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "kvtrain"
FOLDER = PACKAGE / "inference" / "vllm"
GROUP, ENTRY = "vllm.general_plugins", "kvtrain.inference.vllm:register"
PLUGIN = "kvtrain.inference.vllm"
FREE = [f"{PLUGIN}.{name}" for name in ("roles", "ring_pages", "state_layout")]


def project() -> dict:
    return tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())


def brings_vllm(path: Path) -> bool:
    """Whether a file imports vLLM or a file of the plugin, at any depth."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return any(f"{name}.".startswith(("vllm.", f"{PLUGIN}.")) for name in found)


def test_the_entry_point_is_a_function_that_is_there(monkeypatch):
    assert project()["project"]["entry-points"] == {GROUP: {"kvtrain": ENTRY}}
    installed = {entry.value for entry in entry_points(group=GROUP) if entry.name == "kvtrain"}
    assert installed <= {ENTRY}  # an editable installation may be older than the table
    monkeypatch.setitem(sys.modules, "vllm", None)  # whoever imports it now fails
    for name in (PLUGIN, *FREE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module, function = ENTRY.split(":")
    register = getattr(importlib.import_module(module), function)
    for name in FREE:
        importlib.import_module(name)
    with pytest.raises(ImportError, match="vllm"):
        register()


def test_nothing_outside_the_plugin_imports_vllm_or_the_plugin():
    outside = {path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(FOLDER)}
    naming = [path for path in outside if "vllm" in path.read_text(encoding="utf-8")]
    assert PACKAGE / "models" / "paged_layers.py" in naming
    assert [path for path in naming if brings_vllm(path)] == []
    assert brings_vllm(FOLDER / "hosts.py") and brings_vllm(FOLDER / "__init__.py")  # by its function


def test_a_wheel_holds_the_plugin():
    wheel = project()["tool"]["hatch"]["build"]
    assert "kvtrain" in wheel["targets"]["wheel"]["only-include"]
    assert not {"exclude", "artifacts"} & {*wheel, *wheel["targets"]["wheel"]}
    ignored = [line for line in (PACKAGE.parent / ".gitignore").read_text().splitlines() if "vllm" in line]
    assert ignored == []  # what git ignores is not built
