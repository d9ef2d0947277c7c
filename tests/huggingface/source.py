"""Where transformers' own tests come from: the source distribution of the installed version, and a checkout.

A distribution carries ``tests/test_*.py``, but neither ``tests/exporters`` nor ``tests/generation``, which they import:
empty classes stand in for those. ``KVTRAIN_TRANSFORMERS_TESTS`` names a checkout of transformers, from which the tests
of generation are taken. All of it is imported as the package ``transformers_tests``, since ``tests`` is our own.
"""

import functools
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from filelock import FileLock

from kvtrain.data.module import default_cache

PACKAGE = "transformers_tests"
CHECKOUT = "KVTRAIN_TRANSFORMERS_TESTS"
SECONDS = 240


def cache_folder() -> Path:
    """Where the tests of the installed version are kept, ``$KVTRAIN_CACHE/transformers-tests/<version>``."""
    return default_cache() / "transformers-tests" / transformers.__version__


def checkout() -> Path | None:
    """The checkout that the environment names.

    Raises:
        ValueError: It carries no tests of generation.
    """
    if not os.environ.get(CHECKOUT):
        return None
    folder = Path(os.environ[CHECKOUT]).expanduser()
    if not (folder / "tests" / "generation" / "test_utils.py").is_file():
        raise ValueError(f"{CHECKOUT}={folder} has no tests/generation/test_utils.py; name a checkout of transformers")
    return folder


def download(archives: Path) -> Path:
    """The source distribution of the installed version, by pip."""
    wanted = ["--no-deps", "--no-binary", "transformers", f"transformers=={transformers.__version__}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--dest", str(archives), *wanted]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    return next(archives.glob("transformers-*.tar.gz"))


def unpack(archive: Path, target: Path) -> None:
    """Only the tests; the target appears when all of them lie there."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, tarfile.open(archive) as distribution:
        names = (member for member in distribution if member.name.split("/")[1:2] == ["tests"])
        distribution.extractall(scratch, members=names, filter="data")
        next(Path(scratch).glob("*/tests")).rename(target)


@functools.cache
def fetch() -> Path | str:
    """The folder of the tests, or why there is none."""
    target = cache_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        try:
            with tempfile.TemporaryDirectory() as archives:
                unpack(download(Path(archives)), target)
        except subprocess.CalledProcessError as error:
            lines = [*error.stderr.splitlines(), "no word from pip"]
            return next((line for line in lines if "ERROR" in line), lines[-1])
        except subprocess.TimeoutExpired:
            return f"pip took longer than {SECONDS} seconds"
    return target


def stand_in(name: str, *classes: str) -> ModuleType:
    """A module of empty classes, in a package that holds nothing else."""
    parent = name.rpartition(".")[0]
    sys.modules[parent] = ModuleType(parent)
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update({each: type(each, (), {}) for each in classes})
    return module


@functools.cache
def open_package() -> None:
    """Make ``transformers_tests`` importable; skip the module that asks where it cannot be had."""
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    folder, named = fetch(), checkout()
    if isinstance(folder, str):
        pytest.skip(f"transformers' tests are not in {cache_folder()}: {folder}", allow_module_level=True)
    package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    exporters = stand_in(f"{PACKAGE}.exporters.test_export", "ExportTesterMixin", "ExportGenerateTesterMixin")
    if named is None:
        stand_in(f"{PACKAGE}.generation.test_utils", "GenerationTesterMixin")
        return
    package.__path__.append(str(named / "tests"))
    # They call it by its full name, which is ours.
    sys.modules.update({"tests.exporters": ModuleType("tests.exporters"), "tests.exporters.test_export": exporters})
    importlib.import_module(f"{PACKAGE}.generation.test_utils")
    del sys.modules["tests.exporters"], sys.modules["tests.exporters.test_export"]


def mixin(module: str, name: str) -> type:
    """A class of theirs."""
    open_package()
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
