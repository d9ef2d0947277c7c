"""Signals that end a run, in processes that wait for something that never comes."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvtrain import stop_signals
from kvtrain.stop_signals import STOPPING, StopSignals


class Waiting:
    """A forked process that listens, and waits as one does for a lost peer: whatever its handlers do, it goes on."""

    def __init__(self, log: Path, training: bool, ignored: Sequence[signal.Signals] = ()) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
                _wait(training, ignored)
            finally:
                os._exit(99)
        until = time.monotonic() + 60
        while "ready" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < until
            time.sleep(0.01)

    def send(self, number: int, seconds: float) -> int | None:
        """The exit code after at most so many seconds."""
        os.kill(self.pid, number)
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            time.sleep(0.01)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


def _wait(training: bool, ignored: Sequence[signal.Signals]) -> None:
    for number in (*STOPPING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as signals:
        signals.training = training
        os.write(2, b"ready\n")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                time.sleep(30)
            except KeyboardInterrupt:
                os.write(2, b"swallowed\n")
                if signals.interrupted:
                    os.write(2, b"and noted\n")


@pytest.mark.parametrize("number", STOPPING)
def test_before_training_a_process_leaves_at_once(tmp_path, number):
    log = tmp_path / "log"
    assert Waiting(log, training=False).send(number, 5) == 143
    assert f"kvtrain: {number.name} before training has begun, there is nothing to save" in log.read_text()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)])
def test_a_second_signal_is_not_waited_for_and_an_echo_is_none(tmp_path, first, second):
    log = tmp_path / "log"
    process = Waiting(log, training=True)
    assert process.send(first, 0.2) is None
    assert process.send(second, 2.2) is None  # what a launcher hands on
    assert process.send(second, 5) == 143
    assert f"kvtrain: {second.name} after another signal: leaving at once" in log.read_text()


def test_ctrl_c_that_is_swallowed_is_noted_and_a_second_one_ends(tmp_path):
    log = tmp_path / "log"
    process = Waiting(log, training=True)
    assert process.send(signal.SIGINT, 2.2) is None
    assert log.read_text().splitlines()[1:] == ["swallowed", "and noted"]
    assert process.send(signal.SIGINT, 5) == 130


def test_what_the_caller_ignores_stays_ignored(tmp_path):
    process = Waiting(tmp_path / "log", training=False, ignored=[signal.SIGHUP])
    assert process.send(signal.SIGHUP, 0.5) is None
    assert process.send(signal.SIGTERM, 5) == 143


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)]
    with StopSignals() as outer:
        with StopSignals() as inner:
            assert stop_signals.current() is outer
            inner.take_over()
        assert stop_signals.current() is outer
        outer.training = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.asked == signal.SIGUSR1
        outer.interrupted = True
        with pytest.raises(KeyboardInterrupt):
            outer.require_running()
    assert stop_signals.current() is None
    assert [signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)] == before
