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
    whole = [one for one in found if not getattr(one.build_model, "__isabstractmethod__", False)]
    return {one.__name__: one for one in whole if not one.__name__.startswith("_")}


def __getattr__(name: str) -> Any:
    if name.endswith("Module") and name in _modules():
        return _modules()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
