"""Packages that may be missing, and those that are there and do not load."""

import importlib.metadata
import importlib.util
import os

from benchmarks.gpu.measure import one_line
from kvtrain.kernels.dispatch import AVOID

# Distribution, the module that must load, and the backend of kvtrain that needs it.
OPTIONAL = {
    "flash-attn": ("flash_attn", "flash"),
    "liger-kernel": ("liger_kernel.ops.rms_norm", "liger"),
    "flash-linear-attention": ("fla.ops.simple_gla", "fla"),
}


def problem_of(package: str) -> str | None:
    """Why an optional package cannot be used; None where it can."""
    module, _ = OPTIONAL[package]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a wheel built for another torch fails in many ways
        return f"{package} does not load: {one_line(error)}"
    return None


def avoid_broken() -> None:
    """Keep kvtrain from backends whose package is there and does not load."""
    installed = [name for name in OPTIONAL if importlib.util.find_spec(OPTIONAL[name][0].partition(".")[0])]
    broken = [OPTIONAL[name][1] for name in installed if problem_of(name)]
    named = [name for name in os.environ.get(AVOID, "").split(",") if name]
    if broken:
        os.environ[AVOID] = ",".join([*named, *broken])


def version_of(package: str) -> str:
    """A version in words."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"
