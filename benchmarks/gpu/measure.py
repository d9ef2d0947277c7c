"""How things are measured on a GPU: time by its own clock, peaks of its memory, a line as soon as one is known."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.turns import median_seconds, wall_seconds

NO_DEVICE = "not run: no CUDA device"


def one_line(error: BaseException) -> str:
    """An error in one line that is not too long."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:240]


class DeviceLostError(Exception):
    """After some errors a GPU answers nothing more in this process."""


@dataclass
class Bench:
    """A section while it runs.

    Args:
        device: Where.
        seconds: What is not begun by then is not run.
        write: Takes a line of the results.
        small: Tiny shapes, to see that everything runs.
        skip: Steps, measurements or tests, that another process has made.

    Attributes:
        step: Steps that were made or skipped.
        cut: Something was left out, for want of time.
    """

    device: torch.device
    seconds: float
    write: Callable[[str], None]
    small: bool = False
    skip: int = 0
    dtype: torch.dtype = torch.bfloat16
    step: int = 0
    cut: bool = False
    _began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that are left."""
        return self._began + self.seconds - time.monotonic()

    def lost(self) -> bool:
        """Whether the device answers no more."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def measure(self, title: str, call: Callable[[], str]) -> None:
        """Write what the call answers, or in one line why it did not.

        Raises:
            DeviceLostError: Nothing more can be measured in this process.
        """
        self.step += 1
        if self.step <= self.skip:
            return
        if self.left() <= 0:
            self.cut = True
            self.write(f"  {title}: not run: no time left")
            return
        try:
            answer = call()
        except Exception as error:  # whatever happens, the next measurement is made
            answer = f"error: {one_line(error)}"
        self.write(f"  {title}: {answer}")
        if self.lost():
            raise DeviceLostError
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def medians(self, contenders: Mapping[str, Callable[[], Any]], warm_up: int, steps: int) -> dict[str, float]:
        """Median seconds of a call of each contender, which take turns; fewer turns where all is tiny."""
        clock = _device_seconds if self.device.type == "cuda" else wall_seconds
        return median_seconds(contenders, 1 if self.small else warm_up, 1 if self.small else steps, clock)

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes of the device by which a call grows what is allocated, at most; None where there is no device."""
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _device_seconds(call: Callable[[], Any]) -> float:
    """From an idle device to an idle device, by its own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def mebibytes(peak: int | None) -> str:
    """A peak in words."""
    return f"memory {NO_DEVICE}" if peak is None else f"{peak / 2**20:,.0f} MiB"


def ratio(first: int | None, second: int | None) -> str:
    """Of two peaks."""
    return "" if first is None or second is None else f", memory {first / max(1, second):.2f}"
