"""How much memory a process has needed."""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int:
    """On CUDA what torch had allocated at most; elsewhere the most that the process has had in memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most physical memory that this process has had at a time."""
    if _STATUS.is_file():  # Linux' resource usage would tell of the process that started this one, too
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
