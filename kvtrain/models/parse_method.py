"""Methods as text, ``H2O(budget=256, recent=128)``: a call of a known name with literals, of which nothing is run."""

import ast
from collections.abc import Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvtrain.errors import UsageError, unknown
from kvtrain.models.method import Method
from kvtrain.models.registry import methods

_EXAMPLE = "such as 'H2O(budget=256, recent=128)'"


def parse_method(text: str) -> Method:
    """Read a method's settings.

    Args:
        text: A method as Python writes it: its public name, and settings by name, each a number, a string, True, False,
            None, or a list of these.

    Raises:
        UsageError: It is anything else, or names what there is not, in one line with what was most likely meant; or it
            has no cache before it has been trained.
        ValueError: A value is out of range.
    """
    text = text.strip()
    name, call = _read_call(text)
    known = {settings.__name__: settings for settings in methods().values()}
    if name not in known:
        raise UsageError(unknown("method", name, known, f"There are {', '.join(sorted(known))}"))
    method = known[name](**_read_settings(call, known[name], text))
    if not method.servable:
        raise UsageError(
            f"{_shortened(text)} has no cache before training has completed its settings: train it with kvtrain fit, "
            "or give them here"
        )
    return method


def method_text(method: Method) -> str:
    """A method as ``parse_method`` reads it, with the settings that are not its defaults.

    Args:
        method: Its settings.
    """
    own = {field.name: getattr(method, field.name) for field in fields(method)}
    usual = {field.name: field.default for field in fields(method)}
    settings = [f"{name}={value!r}" for name, value in own.items() if value != usual[name]]
    return f"{type(method).__name__}({', '.join(settings)})"


def _read_call(text: str) -> tuple[str, ast.Call]:
    """The name that is called, and the call."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"no method: {_shortened(text)}; write {_EXAMPLE}") from error
    if isinstance(call, ast.Name):
        raise UsageError(f"a method has brackets: write '{call.id}()', or settings between them, {_EXAMPLE}")
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UsageError(f"no method: {_shortened(text)}; write {_EXAMPLE}")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise UsageError(f"settings of a method are given by name, {_EXAMPLE}")
    return call.func.id, call


def _shortened(text: str) -> str:
    """In quotes, on one line."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _read_settings(call: ast.Call, settings: type[Method], text: str) -> dict[str, Any]:
    """What stands between the brackets of a call in this text."""
    known, found = [field.name for field in fields(settings)], dict[str, Any]()
    hints = get_type_hints(settings)
    for keyword in call.keywords:
        name, kind = str(keyword.arg), f"setting of {settings.__name__}"
        if name not in known:
            raise UsageError(unknown(kind, name, known, f"There are {', '.join(known)}"))
        if name in found:
            raise UsageError(f"{kind} '{name}' is given twice")
        try:
            found[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            given = _shortened(ast.get_source_segment(text, keyword.value) or name)
            raise UsageError(f"{kind} '{name}' must be a number, a string or a list, not {given}") from error
        if not _fits(found[name], hints[name]):
            raise UsageError(f"{kind} '{name}': expected {_said(hints[name])}, got {_shortened(repr(found[name]))}")
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a whole number is also a float."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is not None and issubclass(kind, Sequence):
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _said(hint: Any) -> str:
    """An annotated type in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(repr(one) for one in inner)
    if kind in (Union, UnionType):
        return " or ".join(_said(one) for one in inner)
    if kind is not None:
        return f"a list of {_said(inner[0])}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    return words.get(hint, str(hint))
