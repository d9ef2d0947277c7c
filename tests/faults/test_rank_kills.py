"""Kill -9 at random moments, half of them while a sharded checkpoint is being written, of all ranks or of one alone."""

import itertools
import random

import pytest

from kvtrain.training.strategies import DEEPSPEED_INSTALLED

from .ranks import Killer, TwoRanks
from .runs import STEPS, assert_same_run, kill_often, table

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
