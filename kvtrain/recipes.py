"""The recipes and launchers that come with kvtrain: where they lie, what each is for, and reading a recipe."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvtrain import strict_yaml
from kvtrain.errors import UsageError, nearest

_PACKAGE = Path(__file__).parent
_LAUNCHERS = ("*.sh", "*.sbatch", "*.yaml")
_SCALE = re.compile(r"Scale:\s*(?P<scale>.*?)\s*(?:Hardware:\s*(?P<hardware>.*?)\s*)?$")


@dataclass(frozen=True)
class Recipe:
    """One line of ``kvtrain recipes``.

    Attributes:
        path: The YAML file.
        purpose: What it trains, from the file's first comment line.
        scale: Steps and tokens, from its second comment line.
        hardware: What it needs, from the same line.
    """

    path: Path
    purpose: str
    scale: str
    hardware: str


@dataclass(frozen=True)
class Launcher:
    """One line of ``kvtrain recipes --launchers``.

    Attributes:
        path: The script or manifest.
        purpose: What it starts, from the file's first comment line.
        needs: What has to be there, from its second comment line.
    """

    path: Path
    purpose: str
    needs: str


def recipes_folder() -> Path:
    """``recipes/`` of a checkout, or the copy inside an installed package.

    Raises:
        UsageError: Neither is there.
    """
    return _carried("recipes")


def launchers_folder() -> Path:
    """``launch/`` of a checkout, or the copy inside an installed package.

    Raises:
        UsageError: Neither is there.
    """
    return _carried("launch")


def _carried(name: str) -> Path:
    for folder in (_PACKAGE.parent / name, _PACKAGE / name):
        if folder.is_dir():
            return folder
    kind = {"launch": "launchers"}.get(name, name)
    raise UsageError(f"this installation carries no {kind}; write one, or take them from the repository")


def find_config(path: str) -> str:
    """A configuration file that a recipe names: as it stands, or beside the recipes where it is not there.

    Recipes say ``configs/...``; in a checkout that is the working directory's, in an installed package the
    package's own.
    """
    for folder in (Path(), _PACKAGE.parent, _PACKAGE):
        if (folder / path).exists():
            return str(folder / path)
    return path


def list_recipes() -> list[Recipe]:
    """Every recipe, in path order."""
    return [describe(path) for path in sorted(recipes_folder().rglob("*.yaml"))]


def describe(path: Path) -> Recipe:
    """Read a recipe's purpose, scale and hardware from its first two comment lines."""
    purpose, second = _first_comments(path)
    match = _SCALE.match(second)
    scale, hardware = (match["scale"], match["hardware"] or "") if match else ("", "")
    return Recipe(path, purpose.rstrip("."), scale.rstrip("."), hardware.rstrip("."))


def _first_comments(path: Path) -> tuple[str, str]:
    """The first two lines of a file behind its shebang, where they are comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
    first, second = [line.lstrip("# ").rstrip() if line.startswith("#") else "" for line in [*lines, "", ""][:2]]
    return first, second


def list_launchers() -> list[Launcher]:
    """Every launcher, in path order."""
    folder, found = launchers_folder(), []
    for path in sorted(path for pattern in _LAUNCHERS for path in folder.rglob(pattern)):
        purpose, needs = _first_comments(path)
        found.append(Launcher(path, purpose.rstrip("."), needs.removeprefix("Needs: ").rstrip(".")))
    return found


def copy_files(source: Path, target: Path) -> None:
    """Copy a folder of recipes or launchers to where they can be changed.

    Raises:
        UsageError: The target is there already, or cannot be made.
    """
    if target.exists():
        raise UsageError(f"{target} exists already; name a new folder")
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise UsageError(f"{target}: cannot be created ({error.strerror or error})") from error


def shown(path: Path) -> str:
    """A path as one would type it here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def nearest_recipe(given: str) -> str | None:
    """The recipe that a path most likely meant, by its whole path or else by its name."""
    stems = {path.stem: shown(path) for path in recipes_folder().rglob("*.yaml")}
    paths = {path.removesuffix(".yaml"): path for path in (shown(p) for p in recipes_folder().rglob("*.yaml"))}
    whole = nearest(given.removesuffix(".yaml"), paths)
    if whole:
        return paths[whole]
    stem = nearest(Path(given).stem, stems)
    return stems[stem] if stem else None


def read_recipe_file(given: str) -> dict[str, Any]:
    """Parse a recipe's YAML.

    Args:
        given: The path as it was typed.

    Raises:
        UsageError: No such file, or it is no YAML mapping; the message names file and line.
    """
    path = Path(given)
    if not path.is_file():
        meant = nearest_recipe(given)
        hint = f"Did you mean '{meant}'?" if meant else "`kvtrain recipes` lists what there is"
        raise UsageError(f"no recipe at '{given}'. {hint}")
    try:
        content = strict_yaml.load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{given}: not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{given}{explain_yaml(error)}") from error
    if not isinstance(content, dict):
        found = {type(None): "nothing", str: "text", list: "a list"}.get(type(content), "a single value")
        raise UsageError(f"{given}: a recipe is a mapping of trainer, model and data; the file holds {found}")
    for key in content:
        if not isinstance(key, str):
            raise UsageError(
                f"{given}: a recipe is a mapping of trainer, model and data; the file has a section {key!r}"
            )
    return content


def explain_yaml(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, to stand behind its file's name: `` line 3: not YAML (...)``."""
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark else ""
    if isinstance(error, strict_yaml.StrictYAMLError):
        return f"{line}: {error.problem}"
    words = getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split())
    return f"{line}: not YAML ({words})"
