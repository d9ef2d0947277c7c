"""Discovery: every folder ``kvtrain/models/<name>/`` that exports ``METHOD`` or ``MODEL`` is an architecture."""

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

from kvtrain.models.method import Method


@functools.cache
def methods(package: str = "kvtrain.models") -> Mapping[str, type[Method]]:
    """All methods of a package by their name (``dmc``), found by scanning it."""
    return MappingProxyType({method.name: method for method in _exports("METHOD", package)})


def _exports(name: str, package: str) -> Iterator[Any]:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        exported = getattr(importlib.import_module(f"{package}.{module.name}"), name, None) if module.ispkg else None
        if exported is not None:
            yield exported


@dataclass(frozen=True)
class OwnModel:
    """A model that has no host.

    Attributes:
        config: Its configuration.
        module: Where its classes are, which is imported at first use.
        prefix: Their names' beginning: ``<prefix>ForCausalLM``.
    """

    config: type[PreTrainedConfig]
    module: str
    prefix: str

    def head(self, name: str) -> Any:
        """One of its classes, such as ``<prefix>ForCausalLM``."""
        return getattr(importlib.import_module(self.module), name)


@functools.cache
def own_models(package: str = "kvtrain.models") -> tuple[OwnModel, ...]:
    """All models of a package that have no host."""
    return tuple(_exports("MODEL", package))


def own_model_class(config: PreTrainedConfig) -> Any:
    """The class that a configuration was saved with, or None where it is no model of ours."""
    for own in own_models():
        if isinstance(config, own.config):
            return own.head((config.architectures or [f"{own.prefix}ForCausalLM"])[0])
    return None


def method_from_dict(settings: dict[str, Any]) -> Method:
    """Rebuild a method from what ``config.json`` holds.

    Raises:
        ValueError: No method of that name, or a field that it does not have.
    """
    name = str(settings.get("name"))
    if name not in methods():
        raise ValueError(f"unknown method {name!r}; this kvtrain has {', '.join(sorted(methods()))}")
    return methods()[name].from_dict(settings)
