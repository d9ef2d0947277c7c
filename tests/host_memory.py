"""Host memory of this process that belongs to no file."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
_M_MMAP_THRESHOLD = -3
_STATUS = Path("/proc/self/status")


def anonymous() -> int:
    """Bytes now."""
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def peak_above_start(work: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes that some work takes at most, above what there was, looked at every millisecond; and what comes of it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once
    libc.malloc_trim(0)  # and what was freed before must not serve unseen
    start, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return peak - start, result
