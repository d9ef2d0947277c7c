"""Turns what the recipe parser complains about into a line with the place and the remedy."""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from kvtrain import strict_yaml
from kvtrain.errors import UsageError, unknown
from kvtrain.recipes import read_recipe_file

_TYPE_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
}
_MODULES = "kvtrain.training."
_SECTIONS = ("trainer", "model", "data")
_SHOWN = 60  # characters of a wrong value
_OPTIONS_HINT = "See kvtrain fit --help-all"


class SettingLocation(NamedTuple):
    """Where a setting was made: its full dotted name, and the file and line if it was a recipe."""

    name: str
    source: str = ""
    value: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """What may stand on the command line and in a recipe.

    Attributes:
        options: Dotted names of every setting.
        classes: Full and short names of the classes that a recipe may choose.
    """

    options: list[str]
    classes: list[str]


def explain(message: str, settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    """Say in a line what is wrong with a recipe or a command line.

    Args:
        message: The parser's own words, causes included.
        settings: Every setting that was made, command line first.
        vocabulary: What could have been set.
    """
    for pattern, answer in _RULES:
        match = pattern.search(message)
        if match:
            return answer(match, settings, vocabulary)
    return " ".join(message.split())[:300]


def innermost_complaint(message: str) -> str:
    """What a library says is wrong, out of the parser's nest of types that a value might have had."""
    complaints = re.findall(r"^\s*- (.+(?:\n(?!\s*- |Given value).+)*)", message, re.MULTILINE)
    telling = [words for words in complaints if not _ABOUT_TYPES.match(words)]
    return telling[-1] if telling else message


def _unrecognized(match: re.Match[str], settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    word = match[1].split()[0]
    if not word.startswith("-"):
        hint = f"; a recipe is given as --config {word}" if word.endswith((".yaml", ".yml")) else ""
        return f"unexpected word '{word}'{hint}"
    return unknown("option", word.lstrip("-").split("=")[0], vocabulary.options, _OPTIONS_HINT)


def _not_accepted(match: re.Match[str], settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    setting = _locate(match[1], settings)
    return f"{setting.source}{unknown('option', setting.name, vocabulary.options, _OPTIONS_HINT)}"


def _missing_value(match: re.Match[str], *_: Any) -> str:
    return f"option '{match[1].split('/')[-1]}' needs a value"


def _missing(match: re.Match[str], settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    if not any(setting.name.startswith("model") for setting in settings):
        return "no model to train: give a recipe with --config (`kvtrain recipes` lists them)"
    name = match[1].split(",")[0].strip().removeprefix("fit.").removeprefix("validate.")
    full = next((option for option in vocabulary.options if f".{option}".endswith(f".{name}")), name)
    return f"'{full}' is missing; the recipe must set it"


def _class(match: re.Match[str], settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    given = match[1]
    source = next((setting.source for setting in settings if setting.value == given), "")
    return source + unknown("class", given, [*vocabulary.classes, *_classes_beside(given)])


def _wrong_class(match: re.Match[str], settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    source = next((setting.source for setting in settings if setting.value == match[1]), "")
    known = [name.removeprefix(_MODULES) for name in vocabulary.classes if name.startswith(_MODULES)]
    hint = f"; known are {', '.join(known)}" if match[2] == "TrainingModule" else ""
    return f"{source}{match[1]} is not a {match[2]}{hint}"


def _no_class(match: re.Match[str], settings: list[SettingLocation], vocabulary: Vocabulary) -> str:
    setting = _locate(match[1], settings)
    return f"{setting.source}'{setting.name}' needs a class_path, such as {_MODULES}{vocabulary.classes[0]}"


def _wrong_type(match: re.Match[str], settings: list[SettingLocation], _: Vocabulary) -> str:
    setting = _locate(match["key"], settings, match["value"])
    return f"{setting.source}{setting.name}: expected {_type_name(match['type'])}, got '{match['value'].strip()}'"


def _wrong_union(match: re.Match[str], settings: list[SettingLocation], _: Vocabulary) -> str:
    setting = _locate(match["key"], settings, match["value"])
    kinds = dict.fromkeys(_type_name(name) for name in _split_types(match["types"]))
    return f"{setting.source}{setting.name}: expected {' or '.join(kinds)}, got '{_short(match['value'])}'"


def _no_mapping(match: re.Match[str], *_: Any) -> str:
    return f"{match[1]}: expected a mapping or a file with one, got '{match[2]}'"


def _loop(match: re.Match[str], *_: Any) -> str:
    return f"{match[1]}: names itself as its own part; leave that line out"


# Complaints about the types that a value does not have, which say nothing about the type that it was meant to have.
_ABOUT_TYPES = re.compile(r"Expected a|a class path|a dict with|Not a valid subclass|Does not validate|Expected type")
_RULES: list[tuple[re.Pattern[str], Callable[[re.Match[str], list[SettingLocation], Vocabulary], str]]] = [
    (re.compile(r"unrecognized arguments: (.+)"), _unrecognized),
    (re.compile(r"does not accept option '([^']+)'"), _not_accepted),
    (re.compile(r"Option '([^']+)' is not accepted"), _not_accepted),
    (re.compile(r"argument (\S+): expected .*argument"), _missing_value),
    (re.compile(r"arguments are required: (.+)"), _missing),
    (re.compile(r'Parser key "([^"]+)":\s+Unable to load config [\'"](.*)[\'"]'), _no_mapping),
    (re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)"), _wrong_class),
    (re.compile(r"Problem with given class_path '([^']+)':\s+(?:module |No module |Unexpected import)"), _class),
    (re.compile(r"Expected a dot import path string: (\S*)"), _class),
    (re.compile(r"Config file loop detected: (\S+) ->"), _loop),
    # The parser nests its complaints, outermost first: the last one is about the setting itself.
    (
        re.compile(
            r'(?s:.*)Parser key "(?P<key>[^"]+)":\s+(?:- Expected a path but [^\n]*\s+- )?'
            r"Expected a (?P<type>.+?)\. Got value: (?P<value>.*)"
        ),
        _wrong_type,
    ),
    (re.compile(r'Parser key "([^"]+)"(?s:.*)Not a valid subclass of (\w+)'), _no_class),
    (
        re.compile(
            r'(?s:.*)Parser key "(?P<key>[^"]+)":\s+Does not validate[^\n]*\s+Subtypes: \[(?P<types>.*)\]\n'
            r"(?s:.*?)Given value: (?P<value>.*)"
        ),
        _wrong_union,
    ),
]


def _locate(key: str, settings: list[SettingLocation], value: str | None = None) -> SettingLocation:
    """The place of a setting that the parser names by the end of its name alone."""
    found = [setting for setting in settings if f".{setting.name}".endswith(f".{key}")]
    exact = [setting for setting in found if value is not None and setting.value == value.strip()]
    return (exact or found or [SettingLocation(key)])[0]


def _short(value: str) -> str:
    words = " ".join(value.split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."


def _split_types(text: str) -> list[str]:
    """Split ``<class 'int'>, typing.Literal['a', 'b']`` at its outer commas."""
    return re.findall(r"[^,\[]+\[[^\]]*\]+|[^,]+", text)


def _type_name(text: str) -> str:
    text = text.strip()
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return literal[1].replace("'", "")
    name = re.sub(r"<class '(.*)'>", r"\1", text).split("[")[0].split(".")[-1]
    return _TYPE_NAMES.get(name, name)


def _classes_beside(given: str) -> list[str]:
    """Classes of the module that a class path names, as full paths."""
    name, _, _ = given.rpartition(".")
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError):
        return []
    return [f"{name}.{key}" for key, value in vars(module).items() if inspect.isclass(value)]


def check_values(arguments: Iterable[str]) -> None:
    """Refuse values on a command line, and files that they name, before the parser gets lost in them.

    Raises:
        UsageError: One holds itself, stands for too much or gives a key twice; or a section's file cannot be read.
    """
    for name, value in _options(arguments):
        if name in _SECTIONS and value.endswith((".yaml", ".yml")):
            read_recipe_file(value)
        try:
            strict_yaml.check(value)
        except strict_yaml.StrictYAMLError as error:
            raise UsageError(f"{name}: {error.problem}") from error
        except yaml.YAMLError:
            pass  # plain text, as far as anybody knows yet


def places_on_command_line(arguments: Iterable[str]) -> Iterator[SettingLocation]:
    """Settings among command-line arguments, those inside a list or mapping included."""
    for name, value in _options(arguments):
        yield SettingLocation(name, "", value)
        with contextlib.suppress(yaml.YAMLError):
            yield from _inside(value, name)


def _options(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    for word, following in itertools.pairwise([*arguments, ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name.replace(".init_args", ""), value if equals else following


def places_in_file(path: str, text: str) -> Iterator[SettingLocation]:
    """Settings in a recipe's text, with file and line."""
    return _inside(text, "", path)


def _inside(text: str, name: str, path: str = "") -> Iterator[SettingLocation]:
    root = strict_yaml.compose(text)
    if root is not None:
        yield from _walk(root, name, path)


def _walk(node: yaml.Node, name: str, path: str) -> Iterator[SettingLocation]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = name if key.value == "init_args" else f"{name}.{key.value}".lstrip(".")
            scalar = str(value.value) if isinstance(value, yaml.ScalarNode) else ""
            yield SettingLocation(inner, f"{path} line {key.start_mark.line + 1}: " if path else "", scalar)
            yield from _walk(value, inner, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, name, path)


def setting_names(chosen: type, prefix: str) -> set[str]:
    """Dotted names of everything that a class's constructor takes, dataclasses inside included."""
    names: set[str] = set()
    for owner in chosen.__mro__:
        initializer = vars(owner).get("__init__")
        if inspect.isfunction(initializer) and owner.__module__.startswith("kvtrain"):
            hints = typing.get_type_hints(initializer)
            for name in inspect.signature(initializer).parameters:
                if name in hints and name != "return":
                    names |= {f"{prefix}.{name}", *_inner_names(hints[name], f"{prefix}.{name}")}
    return names


def _inner_names(hint: Any, prefix: str) -> set[str]:
    if dataclasses.is_dataclass(hint):
        return {f"{prefix}.{field.name}" for field in dataclasses.fields(hint)}
    return {name for inner in typing.get_args(hint) for name in _inner_names(inner, prefix)}


def concrete_subclasses(base: type[Any]) -> list[type[Any]]:
    """Classes below one that are imported and that a recipe may name, each once."""
    below = dict.fromkeys(_subclasses(base))
    return [chosen for chosen in below if not inspect.isabstract(chosen) and not chosen.__name__.startswith("_")]


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)
