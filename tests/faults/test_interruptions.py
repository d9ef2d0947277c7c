"""Ctrl-C at random moments, some while a checkpoint is being written: the run leaves, soon, and says how to go on."""

import os
import random
import signal
import time

import pytest

from .runs import assert_same_run, log_of, reach, tail, unfinished

MOST_SECONDS = 2.0


def interrupt(place, run, saves, delay):
    """Seconds until the process has left with 130; None where it had ended before."""
    process = place.start(run)
    if saves is None:
        time.sleep(delay)
    elif not reach(process, run, saves, delay):
        assert process.wait() == 0, tail(run)
        return None
    os.kill(process.pid, signal.SIGINT)
    sent = time.monotonic()
    code = process.wait()
    seconds = time.monotonic() - sent
    if code == 0:
        return None  # it was about to end
    assert code == 130, tail(run)
    assert unfinished(run) == set()
    return seconds


@pytest.mark.parametrize(
    ("in_save", "training", "anywhere"),
    [pytest.param(2, 1, 0, marks=pytest.mark.roads), pytest.param(5, 10, 5, marks=pytest.mark.soak)],
)
@pytest.mark.timeout(1800)
def test_ctrl_c_ends_a_run_within_two_seconds(place, whole, tmp_path, in_save, training, anywhere):
    moments = random.Random(in_save)
    planned = [(moments.randrange(1, 3), 0.1 * moments.random()) for _ in range(in_save)]
    planned += [(0, 0.4 * moments.random()) for _ in range(training)]
    planned += [(None, 0.2 + 2 * moments.random()) for _ in range(anywhere)]
    moments.shuffle(planned)
    number, took = 1, []
    while planned:
        seconds = interrupt(place, tmp_path / f"run-{number}", *planned[-1])
        if seconds is None:
            number += 1  # that one is through
        else:
            took.append(seconds)
            planned.pop()
    assert max(took) < MOST_SECONDS
    place.finish(tmp_path / f"run-{number}")
    runs = [tmp_path / f"run-{run}" for run in range(1, number + 1)]
    for run in runs:
        assert_same_run(run, whole)
    assert "the last checkpoint is step-" in "".join(log_of(run).read_text() for run in runs)
