"""Discovery: every folder ``kvtrain/models/<name>/`` that exports ``METHOD`` is an architecture."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvtrain.models.method import Method


@functools.cache
def methods(package: str = "kvtrain.models") -> Mapping[str, type[Method]]:
    """All methods of a package by their name (``dmc``), found by scanning it."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.ispkg:
            continue
        method = getattr(importlib.import_module(f"{package}.{module.name}"), "METHOD", None)
        if method is not None:
            found[method.name] = method
    return MappingProxyType(found)


def method_from_dict(settings: dict[str, Any]) -> Method:
    """Rebuild a method from what ``config.json`` holds.

    Raises:
        ValueError: No method of that name, or a field that it does not have.
    """
    name = str(settings.get("name"))
    if name not in methods():
        raise ValueError(f"unknown method {name!r}; this kvtrain has {', '.join(sorted(methods()))}")
    return methods()[name].from_dict(settings)
