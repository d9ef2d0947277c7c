"""Pages of ``docs/reference`` in Markdown: every command, recipe and setting, as the code has them."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from docstring_parser import Docstring, parse

from kvtrain.recipes import Recipe, list_recipes, recipes_folder

_OWN = "kvtrain."  # modules whose settings are ours to describe
_GENERATED = "<!-- Written by `python -m kvtrain.help`; change the code, and run it again. -->\n"


def reference_pages(commands: Mapping[str, str]) -> dict[str, str]:
    """Text of every page of the reference, by its file's name.

    Args:
        commands: Pages of ``--help`` by the command's name.
    """
    return {
        "cli.md": _commands(commands),
        "recipes.md": _recipes(list_recipes()),
        "methods.md": _methods(),
        "settings.md": _settings(),
    }


def settings_of(kind: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of everything that a class is made with, its bases' own behind it.

    Args:
        kind: Whose constructor, or whose bases' constructors, take settings by name.
    """
    own = _own_bases(kind)
    foreign = {name for base in kind.__mro__ if base not in own for name in vars(base).get("__annotations__", {})}
    meanings = {one.arg_name: one.description or "" for base in reversed(own) for one in _docstring(base).params}
    for parameter in _parameters(kind):
        default = "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        if parameter.name in meanings or parameter.name not in foreign:  # what others describe is not ours to tell
            yield parameter.name, default, meanings.get(parameter.name, "")


def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.startswith(_OWN)]


def _parameters(kind: type) -> list[inspect.Parameter]:
    """Of the constructor, and of those that it hands the rest on to."""
    found: dict[str, inspect.Parameter] = {}
    for base in _own_bases(kind):
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        rest = [one for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD]
        for one in parameters:
            if one not in rest:
                found.setdefault(one.name, one)
        if not rest:
            break
    return list(found.values())


def _docstring(kind: type) -> Docstring:
    return parse(inspect.cleandoc(kind.__doc__ or ""))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; a cell is one line in which a bar is no border."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in ([*titles], ["---"] * len(titles), *cells)]
    return "\n".join(lines) + "\n"


def _section(title: str, kind: type) -> str:
    """What a class is for, and its settings."""
    docstring = _docstring(kind)
    words = [docstring.short_description or "", docstring.long_description or ""]
    rows = [(f"`{name}`", default, meaning) for name, default, meaning in settings_of(kind)]
    parts = [f"## {title}\n", *(f"{part}\n" for part in words if part)]
    return "\n".join([*parts, _table(("setting", "default", "meaning"), rows)] if rows else parts)


def _commands(pages: Mapping[str, str]) -> str:
    texts = [f"## {_titled(name)}\n\n```text\n{page.rstrip()}\n```\n" for name, page in pages.items()]
    return "\n".join(["# Commands\n", _GENERATED, *texts])


def _titled(name: str) -> str:
    return name if name == "kvtrain" else f"kvtrain {name}"


def _recipes(recipes: Sequence[Recipe]) -> str:
    folder = recipes_folder()
    names = {recipe.path: f"recipes/{recipe.path.relative_to(folder)}" for recipe in recipes}
    tiny = [recipe for recipe in recipes if recipe.path.parent != folder]
    published = [recipe for recipe in recipes if recipe.path.parent == folder]
    parts = ["# Recipes\n", _GENERATED]
    for title, group in (("At published scale", published), ("On two CPU cores", tiny)):
        rows = [(f"`{names[one.path]}`", one.purpose, one.scale, one.hardware) for one in group]
        parts += [f"## {title}\n", _table(("recipe", "purpose", "scale", "hardware"), rows)]
    parts.append("## What each says of itself\n")
    parts += [f"### {names[one.path]}\n\n```text\n{_header(one.path)}\n```\n" for one in recipes]
    return "\n".join(parts)


def _header(path: Path) -> str:
    """The comment that a recipe opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end]).rstrip()


def _methods() -> str:
    from kvtrain.models.registry import methods
    from kvtrain.models.transnormer.config import TransNormerConfig

    words = (
        "Settings of `kvtrain.X(...)`, of a recipe's `method:` and of `--method`; sections are those of the papers.\n"
    )
    sections = [_section(f"kvtrain.{kind.__name__}", kind) for kind in methods().values()]
    return "\n".join(
        ["# Methods\n", _GENERATED, words, *sections, _section("kvtrain.TransNormerConfig", TransNormerConfig)]
    )


def _settings() -> str:
    from kvtrain.losses.distillation import Distillation
    from kvtrain.models.adapters import LoRA
    from kvtrain.training import Phase, training_modules
    from kvtrain.training.cli import DATA_MODULES

    words = "Of `model:` and `data:` in a recipe. Those of `trainer:` are in `kvtrain fit --help-all`.\n"
    kinds = (*training_modules(), Phase, Distillation, LoRA, *DATA_MODULES)
    return "\n".join(["# Settings of recipes\n", _GENERATED, words, *(_section(kind.__name__, kind) for kind in kinds)])
