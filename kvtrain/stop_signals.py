"""Signals that end a run: the first one asks, a later one does not wait for an answer."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOPPED_EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
# Launchers hand on what their process group has got already: such an echo is no second request.
_ECHO = 2.0  # seconds
_END = b"\0"

_current: "StopSignals | None" = None
_releases: list[Callable[[], None]] = []  # of what would outlive a process that leaves at once


class StopSignals:
    """Listens to SIGTERM, SIGUSR1, SIGHUP and Ctrl-C while a run lasts, in the main thread.

    Python runs handlers between two of its own instructions, so that a process that waits for a lost peer hears
    nothing. A thread hears every signal at once: it ends the process before training has begun, when there is nothing
    to save, and at a second signal. A signal that the caller ignores, as nohup does with SIGHUP, stays ignored.

    Attributes:
        asked: The first signal that asked the run to stop.
        interrupted: Whether Ctrl-C was pressed.
        training: Whether a step is worth waiting for; set by the run.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.interrupted = self.training = False
        self._before: dict[signal.Signals, Any] = {}
        self._heard: dict[bool, float] = {}  # when the first one came, by whether it was Ctrl-C

    def __enter__(self) -> Self:
        global _current
        if _current is None and threading.current_thread() is threading.main_thread():
            _current = self
            self._before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)}
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, args=(reader,), name="stop signals", daemon=True)
            self._thread.start()
            self.take_over()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _current
        if _current is not self:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, _END)
        self._thread.join()
        os.close(self._writer)
        _current = None

    def take_over(self) -> None:
        """Put our handlers in place, again where a library has put its own."""
        if _current is not self:
            return
        for number in STOPPING:
            if self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._note)
        if self._before[signal.SIGINT] == signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def require_running(self) -> None:
        """For long work to ask now and then: an interruption may get lost in a finalizer.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        if self.interrupted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as heard:
            while (number := heard.read(1)) != _END:
                self._hear(number[0])

    def _hear(self, number: int) -> None:
        if number not in (*STOPPING, signal.SIGINT):
            return
        interrupts, name = number == signal.SIGINT, signal.Signals(number).name
        if not interrupts and not self.training:
            _leave(f"{name} before training has begun, there is nothing to save", STOPPED_EXIT_CODE)
        now = time.monotonic()
        if now - self._heard.setdefault(interrupts, now) >= _ECHO:
            code = INTERRUPTED_EXIT_CODE if interrupts else STOPPED_EXIT_CODE
            _leave(f"{name} after another signal: leaving at once", code)


def _leave(why: str, code: int) -> None:
    os.write(2, f"kvtrain: {why}\n".encode())
    for release in reversed(_releases):
        with suppress(OSError):
            release()
    os._exit(code)


@contextmanager
def released(release: Callable[[], None]) -> Iterator[None]:
    """Let something go in the end, also where a signal makes the process leave at once.

    Args:
        release: Lets it go; may be called from another thread, in the middle of anything.
    """
    _releases.append(release)
    try:
        yield
    finally:
        _releases.remove(release)
        release()


def current() -> StopSignals | None:
    """What listens in this process now."""
    return _current
