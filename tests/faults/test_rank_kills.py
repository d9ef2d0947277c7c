"""Sharded runs: kill -9 of all ranks or of one alone, half of the times in a save, and signals that ask all to end."""

import itertools
import random
import signal
import time

import pytest

from kvtrain import run_folder
from kvtrain.training.strategies import DEEPSPEED_INSTALLED

from .ranks import Killer, TwoRanks
from .runs import STEPS, assert_same_run, kill_often, log_of, reach, table, tail, unfinished

MOST_SECONDS = 5.0  # on a busy machine; it takes one
ZERO2 = pytest.mark.skipif(not DEEPSPEED_INSTALLED, reason="needs DeepSpeed: pip install kvtrain[deepspeed]")


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("zero2", marks=ZERO2)])
def two(place, request):
    return TwoRanks(place, request.param)


@pytest.fixture(scope="module")
def whole_of_two(two, tmp_path_factory):
    run = tmp_path_factory.mktemp(f"whole-{two.strategy}") / "run"
    two.finish(run)
    assert [int(row["step"]) for row in table(run / "metrics.csv")] == list(range(STEPS))
    return run


@pytest.mark.parametrize(
    ("kills", "alone"),
    [
        pytest.param(2, [False, True], marks=pytest.mark.roads, id="2"),
        pytest.param(20, [False], marks=pytest.mark.soak, id="20 of all"),
        pytest.param(20, [True], marks=pytest.mark.soak, id="20 of one"),
    ],
)
@pytest.mark.timeout(3000)
def test_ranks_that_are_killed_end_as_if_they_had_not_been(two, whole_of_two, tmp_path, kills, alone):
    killer = Killer(itertools.cycle(alone), random.Random(kills))
    runs, left = kill_often(two, tmp_path, kills, kills, killer)
    for run in runs:
        assert_same_run(run, whole_of_two)
    assert left >= kills // 6 or all(alone)  # temporary files, which rank 0 removes where it outlives the other


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signals_to_all_ranks_end_them_soon_and_nothing_is_lost(two, whole_of_two, tmp_path):
    """As a launcher hands them on: Ctrl-C loses the steps since the last save, SIGTERM none."""
    run = tmp_path / "run"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        ranks = two.start(run)
        assert reach(ranks, run, 2, 0.1)
        ranks.send(number)
        sent = time.monotonic()
        assert ranks.codes() == [code, code], tail(run)
        assert time.monotonic() - sent < MOST_SECONDS
        assert unfinished(run) == set()
    said, saved = log_of(run).read_text(), run_folder.step_of(run_folder.last_checkpoint(run))
    assert said.count("; continue with the same command and --ckpt_path last") == 2
    assert said.count(f"SIGTERM at step {saved}: saved; continue with --ckpt_path last") == 1
    two.finish(run)
    assert_same_run(run, whole_of_two)
