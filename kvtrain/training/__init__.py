"""Lightning modules, one or a few for each architecture, on one small base.

``kvtrain.training.XModule`` is any class of a module that lies in this folder; it is imported at first use.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kvtrain.training.base import TrainingModule
from kvtrain.training.schedules import Phase

__all__ = ["Phase", "TrainingModule"]


def training_modules() -> list[type[TrainingModule]]:
    """Every class that a recipe can train, in the order of their names."""
    found = {found for module in _files() for found in _modules_in(module)}
    return sorted(found, key=lambda module: module.__name__)


def _files() -> Iterator[ModuleType]:
    for file in pkgutil.iter_modules(__path__):
        if not file.ispkg:
            yield importlib.import_module(f"{__name__}.{file.name}")


def _modules_in(module: ModuleType) -> Iterator[type[TrainingModule]]:
    for value in vars(module).values():
        own = inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, TrainingModule)
        if own and _is_whole(value) and not value.__name__.startswith("_"):
            yield value


def _is_whole(module: type[TrainingModule]) -> bool:
    """Whether nothing is left for subclasses to write; Lightning's metaclass does not say."""
    return not any(getattr(getattr(module, name, None), "__isabstractmethod__", False) for name in dir(module))


def __getattr__(name: str) -> Any:
    if name.endswith("Module"):
        for module in _files():
            for found in _modules_in(module):
                if found.__name__ == name:
                    return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
