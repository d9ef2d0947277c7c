"""The house rule: a room imports from its own floor's list and from the ground, not upward, sideways or in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kvtrain"

# Everyone may use these; they use nobody but each other.
GROUND = {
    *("assets", "durable", "errors", "launcher", "logging_setup", "metrics", "parser", "recipes"),
    *("renamed", "run_folder", "run_lock", "stop_signals", "strict_yaml", "tables"),
}

# Part of the roof, as every other module that lies directly in the package.
ROOF = {"help"}

# Folders of models/ that are no architecture, for models/*.py and architectures alike.
SHARED_MODELS = {"hosts"}

# Which rooms a room may import from, itself and the ground apart.
FLOORS = {
    "kernels": set(),
    "data": set(),
    "plotting": set(),
    "losses": {"kernels"},
    "cache": {"kernels"},
    "models": {"cache", "losses", "kernels", "plotting"},
    "inference": {"models", "cache", "kernels", "data"},
    "training": {"models", "cache", "losses", "kernels", "data"},
    "export": {"models", "cache", "kernels", "data"},
    "evaluation": {"inference", "models", "cache", "losses", "kernels", "data", "plotting"},
}


# Files that import each other in the end, at whatever depth the imports stand. Who opens a circle takes it out.
KNOWN_CIRCLES: list[set[str]] = []


def module_name(path: Path, package: Path) -> str:
    """``<package>/models/dmc/__init__.py`` as ``kvtrain.models.dmc``; a file beside the package by its own name."""
    if not path.is_relative_to(package):
        return path.stem
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(["kvtrain", *(part for part in parts if part != "__init__")])


def statements(node: ast.AST, types: bool) -> Iterator[ast.AST]:
    """Everything below a node, at any depth; ``types`` takes what stands under ``if TYPE_CHECKING`` along."""
    for child in ast.iter_child_nodes(node):
        if types or not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield child
            yield from statements(child, types)


def imported_modules(path: Path, package: Path, types: bool = True) -> set[str]:
    """Every module of ours that a file names in an import, at any depth and, with ``types``, for type checking too.

    ``from kvtrain.a import b`` counts as ``kvtrain.a.b``: ``b`` may be a module.
    """
    name = module_name(path, package)
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), types):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                base = folder.split(".")[: len(folder.split(".")) - node.level + 1]
                start = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{start}.{alias.name}" for alias in node.names)
    return {module for module in found if module.split(".")[0] in ("kvtrain", "kvtrain_cli")}


def import_graph(package: Path, types: bool) -> dict[str, set[str]]:
    """Which files import which, of the package and the command beside it."""
    paths = [*package.rglob("*.py"), *package.parent.glob("kvtrain_cli.py")]
    names = {module_name(path, package): path for path in paths}

    def file_of(module: str) -> str:
        return module if module in names or "." not in module else file_of(module.rpartition(".")[0])

    return {name: {file_of(m) for m in imported_modules(path, package, types)} for name, path in names.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What a file imports, and they, and so on."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph.get(ahead.pop(), set()) - seen
        seen |= new
        ahead += new
    return seen


def circles(package: Path, types: bool) -> list[set[str]]:
    """Groups of files each of which imports every other in the end."""
    graph = import_graph(package, types)
    below = {name: reachable(graph, name) for name in graph}
    groups = {frozenset(m for m in below[name] if name in below[m]) for name in graph if name in below[name]}
    return sorted(map(set, groups), key=sorted)


def architecture(module: str, package: Path) -> str | None:
    """``dmc`` for ``kvtrain.models.dmc.attention``; None outside the architecture folders."""
    parts = module.split(".")
    inside = len(parts) > 2 and parts[1] == "models" and (package / "models" / parts[2]).is_dir()
    return parts[2] if inside and parts[2] not in SHARED_MODELS else None


def violation(importer: str, imported: str, package: Path) -> str | None:
    """Why one module may not import the other, or None."""
    room, other = importer.split(".")[1:2], imported.split(".")[1:2]
    if not room or (room[0] not in FLOORS and room[0] not in GROUND):
        return None  # the roof
    allowed = {room[0], *GROUND, *FLOORS.get(room[0], ())}
    if room[0] in GROUND:
        allowed = set(GROUND)
    if not other or other[0] not in allowed:
        return f"{importer} imports {imported}: `{room[0]}` may import {', '.join(sorted(allowed))}"
    mine, theirs = architecture(importer, package), architecture(imported, package)
    if room[0] == "models" and theirs is not None and theirs != mine:
        return f"{importer} imports {imported}: what two architectures share belongs into models/*.py"
    return None


def violations(package: Path) -> list[str]:
    """Every breach in a package folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        importer = module_name(path, package)
        reasons = (violation(importer, imported, package) for imported in sorted(imported_modules(path, package)))
        found += [reason for reason in reasons if reason]
    return found


def test_nothing_imports_upward_or_sideways():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(("types", "known"), [(False, KNOWN_CIRCLES), (True, KNOWN_CIRCLES)])
def test_files_import_in_no_circle_but_those_known(types, known):
    assert circles(PACKAGE, types) == known


@pytest.mark.parametrize(
    ("b", "of_types_alone"),
    [
        ("from kvtrain import a", False),
        ("def f():\n    from kvtrain.a import something", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvtrain.a import A", True),
    ],
)
def test_a_planted_circle_is_found(tmp_path, b, of_types_alone):
    package = tmp_path / "kvtrain"
    package.mkdir()
    for name, source in {"__init__": "", "a": "import kvtrain.c", "b": b, "c": "from . import b", "d": b}.items():
        (package / f"{name}.py").write_text(source + "\n")
    circle = [{"kvtrain.a", "kvtrain.b", "kvtrain.c"}]
    assert circles(package, types=True) == circle
    assert circles(package, types=False) == ([] if of_types_alone else circle)


def test_the_command_beside_the_package_is_in_the_graph(tmp_path):
    (tmp_path / "kvtrain").mkdir()
    (tmp_path / "kvtrain" / "cli.py").write_text("from kvtrain_cli import quick_answer\n")
    (tmp_path / "kvtrain_cli.py").write_text("def main():\n    from kvtrain.cli import main\n")
    assert circles(tmp_path / "kvtrain", types=False) == [{"kvtrain.cli", "kvtrain_cli"}]


def draws(path: Path) -> bool:
    """Whether importing a file imports matplotlib by its own words."""
    imports = (node for node in statements(ast.parse(path.read_text(encoding="utf-8")), types=False))
    names = [ast.unparse(node).split()[1] for node in imports if isinstance(node, ast.Import | ast.ImportFrom)]
    return any(name.split(".")[0] == "matplotlib" for name in names)


def test_nothing_that_trains_or_serves_imports_what_draws():
    """Reports alone do. (Lightning's metrics import matplotlib where it is installed; that is theirs.)"""
    graph = import_graph(PACKAGE, types=False)
    drawing = {module_name(path, PACKAGE) for path in PACKAGE.rglob("*.py") if draws(path)}
    assert {"kvtrain.plotting.canvas", "kvtrain.models.duo.figures", "kvtrain.evaluation.report"} <= drawing
    rooms = ("kvtrain.training", "kvtrain.inference", "kvtrain.export", "kvtrain.models.registry")
    assert {name for name in graph if name.startswith(rooms) and reachable(graph, name) & drawing} == set()


def test_every_room_has_a_floor():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - GROUND - ROOF == set(FLOORS)


def test_floors_have_no_cycle():
    settled: set[str] = set()
    while remaining := set(FLOORS) - settled:
        ready = {room for room in remaining if FLOORS[room] <= settled}
        assert ready, f"each of {sorted(remaining)} waits for another"
        settled |= ready


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/rope.py", "from kvtrain.cache.store import PagedStore"),
        ("kernels/rope.py", "def f():\n    import kvtrain.models.host"),
        ("kernels/rope.py", "from kvtrain import load"),
        ("kernels/rope.py", "from ..data import packing"),
        ("data/shards.py", "from kvtrain.kernels import rope"),
        ("plotting/heads.py", "from kvtrain.models.gating import HEAD_COMPRESSION"),
        ("training/base.py", "from kvtrain.plotting import canvas"),
        ("losses/gate_regularization.py", "from kvtrain.models.gating import decide"),
        ("models/host.py", "from kvtrain.training import base"),
        ("models/host.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kvtrain.inference.load"),
        ("models/dmc/cache.py", "from kvtrain.models.dms.config import DMS"),
        ("models/dmc/cache.py", "from ..dms import config"),
        ("models/gating.py", "from kvtrain.models.dmc import DMC"),
        ("export/card.py", "from kvtrain.training.base import TrainingModule"),
        ("inference/engine.py", "from kvtrain.evaluation import perplexity"),
        ("training/base.py", "from kvtrain import cli"),
        ("assets/__init__.py", "from kvtrain.kernels import rope"),
    ],
)
def test_a_planted_breach_is_caught(tmp_path, file, source):
    for name in ("dmc", "dms"):
        (tmp_path / "models" / name).mkdir(parents=True)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from kvtrain.training.cli import main"),
        ("kernels/rope.py", "import torch\nfrom .norm import rms_norm\nfrom kvtrain.kernels.dispatch import use"),
        (
            "models/dmc/cache.py",
            "from kvtrain.cache.store import PagedStore\nfrom ..gating import decide\nfrom . import config",
        ),
        ("data/tokenizer.py", "from kvtrain.assets import resolve"),
        ("inference/load.py", "import kvtraining.models"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, source):
    (tmp_path / "models" / "dmc").mkdir(parents=True)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    assert violations(tmp_path) == []
