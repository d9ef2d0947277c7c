"""What is found by being there: a folder or a file that exports a certain name."""

import importlib
import importlib.util
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


def exported_by_files(package: str, file: str, name: str) -> list[Any]:
    """What the files of one name export, which the folders of a package may have or not; other files are not imported.

    Args:
        package: Its dotted name.
        file: Such as ``figures``.
        name: Such as ``FIGURES``, which every one of them exports.
    """
    path = importlib.import_module(package).__path__
    files = [f"{package}.{module.name}.{file}" for module in pkgutil.iter_modules(path) if module.ispkg]
    return [getattr(importlib.import_module(one), name) for one in files if importlib.util.find_spec(one)]
