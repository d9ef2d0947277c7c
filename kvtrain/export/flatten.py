"""Modules of kvtrain as flat files that import each other alone, which is the form in which transformers takes code.

What follows from transformers' ``dynamic_module_utils``: it copies files and no folders, takes along what it finds
named in ``from .name import``, and refuses a file that names an absent package anywhere but in a ``try``.
"""

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

PACKAGE = "kvtrain"
# What is there wherever transformers and torch are.
PRESENT = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "packaging", "safetensors", "huggingface_hub"}
_GUARD = "raise  # tried, because transformers refuses files that name absent packages elsewhere"


class Import(NamedTuple):
    """An import statement, and when it is run.

    Attributes:
        node: The statement.
        at_once: When its module is imported, and not in a function.
        tried: In a ``try``, which transformers does not look into.
        for_types: Under ``if TYPE_CHECKING``, so never.
    """

    node: ast.Import | ast.ImportFrom
    at_once: bool = True
    tried: bool = False
    for_types: bool = False


class Target(NamedTuple):
    """What a statement imports of one of our modules.

    Attributes:
        module: Its dotted name.
        names: From it, as in ``from module import names``; or the module itself, under the one name that is here.
        whole: Which of the two.
    """

    module: str
    names: list[ast.alias]
    whole: bool

    def statement(self, file: str) -> str:
        """The same from a file beside, whose name is without ``.py``."""
        if self.whole:
            return f"from . import {file} as {self.names[0].asname or self.names[0].name}"
        return ast.unparse(ast.ImportFrom(file, self.names, level=1))


class Substitute(NamedTuple):
    """A file that travels in a module's place.

    Attributes:
        file: Its name without ``.py``.
        names: What others may import from it.
    """

    file: str
    names: frozenset[str]


class Module:
    """A module's source, and the modules of kvtrain that it needs.

    Args:
        name: Dotted.

    Raises:
        ValueError: It cannot travel; the message says why.
    """

    def __init__(self, name: str) -> None:
        self.name, self._text = name, _source(name)
        tree = ast.parse(self._text)
        self._imports = [(one, self._targets(one.node)) for one in _imports(tree, Import)]
        for node in ast.walk(tree):
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if called in ("import_module", "__import__"):
                raise ValueError(f"{name} imports what it chooses while it runs ({called}); let it name what it needs")

    def needed(self, at_once: bool = False) -> set[str]:
        """Our modules that it imports, or those alone that are imported with it, and not where a function runs."""
        found = (pair for pair in self._imports if not pair[0].for_types and (pair[0].at_once or not at_once))
        return {target.module for _, targets in found for target in targets}

    def check(self, replaced: Mapping[str, Substitute]) -> None:
        """Refuse what is asked of a module in whose place another travels that does not have it.

        Raises:
            ValueError: There is something.
        """
        asked = (target for one, targets in self._imports if not one.for_types for target in targets)
        for target in asked:
            names = replaced[target.module].names if target.module in replaced else None
            lacking = [] if names is None else [alias.name for alias in target.names if alias.name not in names]
            if lacking:
                raise ValueError(f"{self.name} asks {target.module} for {lacking[0]}, which no folder has")

    def rewritten(self, files: Mapping[str, str], eager: bool) -> str:
        """Its source with imports of ours made relative, and of packages that may be absent put into ``try``.

        Args:
            files: Names of files, without ``.py``, by the modules that travel.
            eager: It is imported with the model; the others are where a function runs that needs them.

        Raises:
            ValueError: It needs a package that may be absent, or an import is not alone on its line.
        """
        lines = self._text.splitlines()
        for one, targets in sorted(self._imports, key=lambda pair: -pair[0].node.lineno):
            new = self._statements(one, targets, files, eager)
            if new is not None:
                first, last = one.node.lineno - 1, one.node.end_lineno or one.node.lineno
                before, after = lines[first][: one.node.col_offset], lines[last - 1].encode()[one.node.end_col_offset :]
                if before.strip() or (after.strip() and not after.strip().startswith(b"#")):
                    raise ValueError(f"{self.name}: an import shares line {last} with something; give it its own")
                lines[first:last] = [before + line for line in new]
        return "\n".join(lines) + "\n"

    def _statements(
        self, one: Import, targets: list[Target], files: Mapping[str, str], eager: bool
    ) -> list[str] | None:
        """What takes a statement's place; None where it stays as it is."""
        foreign = [] if targets else sorted(_packages(one.node) - PRESENT)
        if one.for_types and (foreign or not {target.module for target in targets} <= files.keys()):
            return ["pass"]
        if targets:
            return [target.statement(files[target.module]) for target in targets]
        if not foreign or one.tried:
            return None
        if eager and one.at_once:
            raise ValueError(f"{self.name} needs {foreign[0]}, which may be absent; import it where it is used")
        return ["try:", f"    {ast.unparse(one.node)}", "except ImportError:", f"    {_GUARD}"]

    def _targets(self, node: ast.Import | ast.ImportFrom) -> list[Target]:
        if PACKAGE not in _packages(node) and not getattr(node, "level", 0):
            return []
        if isinstance(node, ast.Import):
            if len(node.names) > 1 or not node.names[0].asname:
                raise ValueError(f"{self.name}: line {node.lineno} imports a module by its whole name; use `from`")
            return [Target(node.names[0].name, node.names, whole=True)]
        folder = self.name if _is_package(self.name) else self.name.rpartition(".")[0]
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), folder)
        modules = {alias.name for alias in node.names if _is_module(base, alias.name)}
        names = [alias for alias in node.names if alias.name not in modules]
        whole = [Target(f"{base}.{alias.name}", [alias], True) for alias in node.names if alias.name in modules]
        return whole + ([Target(base, names, False)] if names else [])


def flatten(starts: Iterable[str], replaced: Mapping[str, Substitute]) -> dict[str, str]:
    """Modules, and all of kvtrain that they import, as files beside each other.

    Args:
        starts: Dotted names of modules.
        replaced: What travels in the place of some modules.

    Returns:
        Text of the files, by the dotted names of the modules, in their order; a replaced module has none.

    Raises:
        ValueError: A module cannot travel; the message says why.
    """
    modules = _closure(starts, replaced)
    eager = _reach(starts, lambda name: modules[name].needed(at_once=True) if name in modules else ())
    for name in sorted(modules):
        modules[name].check(replaced)
    files = {name: flat_name(name) for name in modules}
    assert len(set(files.values())) == len(files), "two modules have one flat name"
    files |= {name: other.file for name, other in replaced.items()}
    return {name: modules[name].rewritten(files, name in eager) for name in sorted(modules)}


def flat_name(module: str) -> str:
    """``kvtrain_models_dmc_config`` for ``kvtrain.models.dmc.config``."""
    return module.replace(".", "_")


def _closure(starts: Iterable[str], replaced: Mapping[str, Substitute]) -> dict[str, Module]:
    modules: dict[str, Module] = {}

    def needed(name: str) -> Iterable[str]:
        if name in replaced:
            return ()
        modules[name] = Module(name)
        return modules[name].needed()

    _reach(starts, needed)
    return modules


def _reach(starts: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    """All that follows from the first ones, each asked once."""
    seen, ahead = set[str](), [*starts]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += following(name)
    return seen


def _imports(node: ast.AST, context: Callable[..., Import]) -> Iterator[Import]:
    """Import statements at or below a node, made by what knows of its surroundings."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield context(node)
    for field, value in ast.iter_fields(node):
        inner = context
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and field == "body":
            inner = functools.partial(context, at_once=False)
        elif isinstance(node, ast.Try):
            inner = functools.partial(context, tried=True)
        elif isinstance(node, ast.If) and field == "body" and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inner = functools.partial(context, for_types=True)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _imports(child, inner)


def _packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Names of the packages that a statement imports from; of none where it is relative."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {(node.module or "").partition(".")[0]} if node.level == 0 else set()


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name) if name.partition(".")[0] == PACKAGE else None
    text = getattr(spec and spec.loader, "get_source", lambda _: None)(name) if spec else None
    if text is None:
        raise ValueError(f"{name} is no source file of {PACKAGE}, and nothing else can travel")
    return str(text)


def _is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None


def _is_module(package: str, name: str) -> bool:
    """Whether a name that is imported from somewhere is a module; others are not imported to find out."""
    return _is_package(package) and importlib.util.find_spec(f"{package}.{name}") is not None
