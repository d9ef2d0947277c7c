"""Lightning modules, one or a few for each architecture, on one small base.

``kvtrain.training.XModule`` is any class of a module that lies in this folder; it is imported at first use.
"""

import functools
import importlib
import inspect
import pkgutil
from typing import Any

from kvtrain.training.base import TrainingModule
from kvtrain.training.schedules import Phase

__all__ = ["Phase", "TrainingModule"]


def training_modules() -> list[type[TrainingModule]]:
    """Every class that a recipe can train, in the order of their names."""
    return [_modules()[name] for name in sorted(_modules())]


@functools.cache
def _modules() -> dict[str, type[TrainingModule]]:
    files = [file.name for file in pkgutil.iter_modules(__path__) if not file.ispkg]
    values = [value for name in files for value in vars(importlib.import_module(f"{__name__}.{name}")).values()]
    found = [value for value in values if inspect.isclass(value) and issubclass(value, TrainingModule)]
    return {one.__name__: one for one in found if not one.__name__.startswith("_") and not inspect.isabstract(one)}


def __getattr__(name: str) -> Any:
    if name.endswith("Module") and name in _modules():
        return globals().setdefault(name, _modules()[name])  # found without us from now on
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
