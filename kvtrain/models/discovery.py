"""What is found by being there: a folder or a file that exports a certain name."""

import importlib
import pkgutil
from typing import Any


def exported(package: str, name: str, folders: bool) -> list[Any]:
    """What the modules of a package export under a name; those that do not have it are passed over.

    Args:
        package: Its dotted name.
        name: Such as ``ARCHITECTURE``.
        folders: Look into the package's folders, or into its files; the others are not imported.
    """
    path = importlib.import_module(package).__path__
    chosen = [module.name for module in pkgutil.iter_modules(path) if module.ispkg == folders]
    modules = [importlib.import_module(f"{package}.{module}") for module in chosen]
    return [getattr(module, name) for module in modules if hasattr(module, name)]
