"""The head of the results: hardware and versions."""

import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.packages import OPTIONAL, problem_of, version_of

TINY = "no CUDA device: tiny shapes, whose figures say nothing"
LIBRARIES = ("torch", "triton", "transformers", "liger-kernel", "flash-attn", "flash-linear-attention")


def run(bench: Bench) -> None:
    """Write what the figures below it were measured on."""
    bench.write(_device() if bench.device.type == "cuda" else TINY)
    bench.write(
        f"{os.cpu_count()} cores of {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    )
    bench.write(", ".join(version_of(name) for name in LIBRARIES))
    for package in OPTIONAL:
        if problem := problem_of(package):
            bench.write(f"{package}: not run: {problem}")


def _device() -> str:
    found = torch.cuda.get_device_properties(0)
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return (
        f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors, "
        f"capability {found.major}.{found.minor}, {runtime}, driver {_driver()}"
    )


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return asked.stdout.split("\n")[0].strip() or "unknown"
