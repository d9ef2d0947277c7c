"""House rules on the source itself: sizes, docstrings, safety, light imports, discovery."""

import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "kvtrain").rglob("*.py"), *ROOT.glob("*.py")])
CODE = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

TESTED_EXTRAS = ("serve", "dev", "deepspeed", "tensorboard", "wandb", "eval", "interop", "docs")
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 80
# Of the package alone.
MOST_SOURCE_FILE_LINES = 400
MOST_SOURCE_FUNCTION_LINES, MEDIAN_FUNCTION_LINES, P90_FUNCTION_LINES = 60, 7, 22
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def long_files(paths: list[Path], most: int = MOST_FILE_LINES) -> list[str]:
    """Files above the limit, with their lengths."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{shown(path)}: {length} lines" for path, length in lengths.items() if length > most]


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first line and length of a file's functions, from their first decorator to their last line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, first, (node.end_lineno or first) - first + 1


def long_functions(path: Path) -> list[str]:
    """Functions above the limit."""
    return [
        f"{shown(path)}:{first} {name}: {length} lines"
        for name, first, length in functions(path)
        if length > MOST_FUNCTION_LINES
    ]


def public_definitions(tree: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Public classes and functions of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def undocumented(path: Path) -> list[str]:
    """What a reader would look up in vain."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [f"{shown(path)}:{node.lineno} {node.name}" for node in public_definitions(tree) if not has_words(node)]
    return [f"{shown(path)}: the module", *missing] if not ast.get_docstring(tree) else missing


def has_words(node: Definition) -> bool:
    """Whether it has a docstring; a function from ``typing.overload`` or a setter borrows its sibling's."""
    borrowed = {"overload", "setter", "override"}
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return bool(ast.get_docstring(node)) or bool(names & borrowed)


def unsafe_loads(path: Path) -> list[str]:
    """Calls that would run code from a checkpoint."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            if not (isinstance(node.value, ast.Constant) and node.value.value is True):
                found.append(f"{shown(path)}:{node.value.lineno} weights_only={ast.unparse(node.value)}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("pickle.load", "pickle.loads"):
            found.append(f"{shown(path)}:{node.lineno} {ast.unparse(node.func)}")
    return found


def test_the_scan_sees_the_house():
    names = {shown(path) for path in CODE}
    assert {"kvtrain/__init__.py", "kvtrain/models/host.py", "tests/test_house.py"} <= names
    assert len(RECIPES) >= 1


def test_files_are_short():
    assert long_files(CODE) == []


def test_functions_are_short():
    assert [line for path in CODE for line in long_functions(path)] == []


def test_files_of_the_package_are_shorter():
    assert long_files(SOURCES, MOST_SOURCE_FILE_LINES) == []


def test_functions_of_the_package_are_small():
    sizes = [(f"{shown(path)} {name}", length) for path in SOURCES for name, _, length in functions(path)]
    assert [name for name, length in sizes if length > MOST_SOURCE_FUNCTION_LINES] == []
    lengths = [length for _, length in sizes]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION_LINES
    assert statistics.quantiles(lengths, n=10)[-1] <= P90_FUNCTION_LINES


def test_nothing_is_left_to_do():
    here = Path(__file__)
    found = [
        f"{shown(path)}:{number} {line.strip()}"
        for path in [*CODE, *RECIPES, ROOT / "Makefile"]
        if path != here
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def test_no_checkpoint_can_run_code():
    assert [line for path in SOURCES for line in unsafe_loads(path)] == []


def test_everything_public_is_documented():
    assert [line for path in SOURCES for line in undocumented(path)] == []


@pytest.mark.parametrize("path", RECIPES, ids=shown)
def test_a_recipe_opens_with_its_purpose(path):
    first, second = [*path.read_text(encoding="utf-8").splitlines(), "", ""][:2]
    assert re.match(r"# \w.{15,}", first), "the first line says what the recipe is for"
    assert re.match(r"# Scale: .+Hardware: .+", second), "the second line says its scale and hardware"


def test_the_scans_find_what_they_look_for(tmp_path):
    bad = tmp_path / "bad.py"
    body = "\n".join(f"    x{i} = {i}" for i in range(MOST_FUNCTION_LINES))
    bad.write_text(f"def long():\n{body}\n\nclass A:\n    def m(self): load(f, weights_only=False)\n" + "\n" * 500)
    assert long_files([bad]) == ["bad.py: 584 lines"]
    assert long_files([bad], most=584) == []
    assert list(functions(bad)) == [("long", 1, 81), ("m", 84, 1)]
    assert long_functions(bad) == ["bad.py:1 long: 81 lines"]
    assert undocumented(bad) == ["bad.py: the module", "bad.py:1 long", "bad.py:83 A", "bad.py:84 m"]
    assert unsafe_loads(bad) == ["bad.py:84 weights_only=False"]


IMPORTS = """
import json, sys
from transformers import AutoModelForCausalLM
before = set(sys.modules)
import kvtrain
print(json.dumps({"all": sorted(sys.modules), "added": sorted(set(sys.modules) - before)}))
"""


def test_import_is_light():
    """``import kvtrain`` brings in no trainer, no data library, and no modelling code that the Auto classes do not."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = json.loads(result.stdout.splitlines()[-1])
    heavy = {"lightning", "pytorch_lightning", "datasets", "deepspeed", "matplotlib", "wandb", "lm_eval"}
    heavy |= {"fastapi", "uvicorn", "openai", "prometheus_client", "vllm"}
    assert heavy & {name.split(".")[0] for name in modules["all"]} == set()
    assert [name for name in modules["added"] if name.split(".")[-1].startswith("modeling_")] == []
    assert "kvtrain.models.registry" in modules["added"]


METHOD_SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from kvtrain.models.full import Full
from kvtrain.models.registry import MethodArchitecture

@dataclass(frozen=True)
class Dummy(Full):
    name: ClassVar[str] = "dummy"
    width: int = 3

ARCHITECTURE = MethodArchitecture(Dummy, "kvtrain.models.full.build")
"""


def test_a_new_architecture_is_found_by_its_folder_alone(tmp_path, monkeypatch):
    from kvtrain.models.registry import methods

    package = tmp_path / "planted_models"
    (package / "dummy").mkdir(parents=True)
    (package / "shared").mkdir()
    (package / "__init__.py").write_text("")
    (package / "plain.py").write_text("ARCHITECTURE = None\n")
    (package / "shared" / "__init__.py").write_text("")
    (package / "dummy" / "__init__.py").write_text(METHOD_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    found = methods("planted_models")

    assert list(found) == ["dummy"]
    settings = found["dummy"].from_dict({"name": "dummy", "width": 5}).to_dict()
    assert settings.items() >= {"name": "dummy", "width": 5}.items()


def test_the_package_knows_its_own_methods():
    from kvtrain.models.registry import architectures, methods

    folders = {path.parent.name for path in (ROOT / "kvtrain" / "models").glob("*/config.py")}
    exporting = {name for name in folders if hasattr(importlib.import_module(f"kvtrain.models.{name}"), "ARCHITECTURE")}
    policies = list((ROOT / "kvtrain" / "models").glob("*/policies/[!_]*.py"))  # of a folder that has many methods
    assert len(architectures()) == len(exporting) + len(policies)
    assert exporting - {"transnormer"} <= set(methods()) and len(methods()) == len(exporting) - 1 + len(policies)


def pins() -> dict[str, str]:
    """Names and versions of the tested set."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def test_the_tested_set_pins_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The others need a GPU, or bring a whole evaluation suite.
    installed = [*project["dependencies"], *(line for extra in TESTED_EXTRAS for line in extras[extra])]
    named = [Requirement(line) for line in installed if not line.startswith("kvtrain[")]
    assert [str(need) for need in named if pins().get(canonicalize_name(need.name)) not in need.specifier] == []


def test_the_tested_set_is_exact_and_names_no_index():
    assert pins()["torch"] == "2.13.0"
    assert [name for name, version in pins().items() if not re.fullmatch(r"\d[\w.]*", version)] == []
    for name in ("constraints.txt", "pyproject.toml", "Makefile"):
        assert "://" not in (ROOT / name).read_text(), f"{name} names an address"


def test_every_marker_is_a_tier_that_make_test_leaves_out():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = [line.split(":")[0] for line in settings["markers"]]
    fast = re.search(r"^FAST +:= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert fast and fast[1].split(" and ") == [f"not {marker}" for marker in markers]
    tiers = (ROOT / "CONTRIBUTING.md").read_text().split("## Tests")[1]
    assert re.findall(r"^\| [\w ]+ \| `(\w+)` \|", tiers, re.MULTILINE) == markers


def test_no_dependency_has_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    operators = {spec.operator for line in lines for spec in Requirement(line).specifier}
    assert operators == {">="}
