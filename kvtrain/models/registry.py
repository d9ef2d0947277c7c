"""Discovery: a folder ``kvtrain/models/<name>/`` with an ``ARCHITECTURE`` is one, with ``ARCHITECTURES`` several."""

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from kvtrain.models.discovery import exported, exported_by_files
from kvtrain.models.figures import Figures
from kvtrain.models.method import Method

if TYPE_CHECKING:
    from kvtrain.models.build import Builder


@dataclass(frozen=True)
class MethodArchitecture:
    """A way to shrink the cache of a host.

    Attributes:
        settings: The method's settings.
        module: Where its ``Builder`` is, which is imported at first use.
    """

    settings: type[Method]
    module: str

    def builder(self, settings: Method, host_config: PreTrainedConfig) -> "Builder[Any]":
        """What makes modules and caches of these settings for this host."""
        built: Builder[Any] = importlib.import_module(self.module).Builder(settings, host_config)
        return built


@dataclass(frozen=True)
class ModelArchitecture:
    """A model that has no host.

    Attributes:
        config: Its configuration.
        module: Where its classes are, which is imported at first use.
        prefix: Their names' beginning: ``<prefix>ForCausalLM``.
        tasks: Their names' ends.
    """

    config: type[PreTrainedConfig]
    module: str
    prefix: str
    tasks: tuple[str, ...] = ("CausalLM",)

    @property
    def heads(self) -> list[str]:
        """Names of all its classes."""
        return [f"{self.prefix}For{task}" for task in self.tasks]

    def head(self, name: str) -> Any:
        """One of its classes, such as ``<prefix>ForCausalLM``."""
        return getattr(importlib.import_module(self.module), name)


@functools.cache
def architectures(package: str = "kvtrain.models") -> tuple[MethodArchitecture | ModelArchitecture, ...]:
    """All architectures of a package, found by scanning it."""
    several = exported(package, "ARCHITECTURES", folders=True)
    return (*exported(package, "ARCHITECTURE", folders=True), *(one for family in several for one in family))


def figures(package: str = "kvtrain.models") -> Figures:
    """What reports show of all architectures of a package: of each that has a file ``figures.py``."""
    return Figures.union(exported_by_files(package, "figures", "FIGURES"))


def methods(package: str = "kvtrain.models") -> dict[str, type[Method]]:
    """Settings of all methods of a package by their name (``dmc``)."""
    found = architectures(package)
    return {one.settings.name: one.settings for one in found if isinstance(one, MethodArchitecture)}


@functools.cache
def public_names(found: tuple[MethodArchitecture | ModelArchitecture, ...]) -> dict[str, str]:
    """What ``kvtrain`` offers of architectures, settings, configurations and model classes: modules by their names."""
    names: dict[str, str] = {}
    for one in found:
        settings = one.settings if isinstance(one, MethodArchitecture) else one.config
        names[settings.__name__] = settings.__module__
        if isinstance(one, ModelArchitecture):
            names.update(dict.fromkeys(one.heads, one.module))
    return names


def own_models(package: str = "kvtrain.models") -> list[ModelArchitecture]:
    """All models of a package that have no host."""
    return [one for one in architectures(package) if isinstance(one, ModelArchitecture)]


def method_architecture(settings: Method) -> MethodArchitecture:
    """Where the code of a method is, from its settings."""
    for one in architectures():
        if isinstance(one, MethodArchitecture) and one.settings.name == settings.name:
            return one
    raise AssertionError(f"no architecture has settings of type {type(settings).__name__}")


def builder(settings: Method, host_config: PreTrainedConfig) -> "Builder[Any]":
    """What makes modules and caches of these settings for this host."""
    return method_architecture(settings).builder(settings, host_config)


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
