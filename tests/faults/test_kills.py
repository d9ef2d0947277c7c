"""Kill -9 at random moments, half of them while a checkpoint is being written: nothing is lost."""

import pytest

from .runs import STEPS, assert_same_run, kill_often, table


@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(3, 1, marks=pytest.mark.roads), pytest.param(20, 2, marks=pytest.mark.soak)],
)
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(place, whole, tmp_path, kills, seed):
    assert [int(row["step"]) for row in table(whole / "metrics.csv")] == list(range(STEPS))
    runs, left = kill_often(place, tmp_path, kills, seed)
    for run in runs:
        assert_same_run(run, whole)
    assert left >= kills // 6 + 1  # temporary files, which the next process has removed
