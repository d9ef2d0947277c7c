"""Two ranks, of which one gets a signal, fails, is killed or hangs: all end, soon, and say which one it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtrain import run_folder
from tests.processes import PATIENCE, ROOT
from tests.training.small_runs import acting

from .ranks import TIMEOUT, TwoRanks
from .runs import assert_same_run, log_of, reach

pytestmark = [pytest.mark.roads, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def two(place):
    return TwoRanks(place)


@pytest.fixture(scope="module")
def whole_of_two(two, tmp_path_factory):
    """What two ranks come to that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole-of-two") / "run"
    two.finish(run)
    return run


def test_one_rank_s_signal_counts_for_all(two, whole_of_two, tmp_path):
    run = tmp_path / "run"
    assert two.start(run, second=acting(int(signal.SIGUSR1), 9)).codes() == [143, 143]
    assert run_folder.step_of(run_folder.last_checkpoint(run)) == 5
    assert log_of(run).read_text().count("SIGUSR1 at step 5: saved; continue with --ckpt_path last") == 1
    two.finish(run)
    assert_same_run(run, whole_of_two)


def test_a_rank_that_fails_is_named_with_its_error(two, tmp_path):
    run = tmp_path / "run"
    codes, said = two.start(run, second=acting("crash", 9)).codes(), log_of(run).read_text()
    assert 0 not in codes
    assert "kvtrain: error: rank 1 of 2 ends at step 5: RuntimeError: planted" in said
    lost = next(line for line in said.splitlines() if line.startswith("kvtrain: error: rank 0 of 2"))
    assert "ends at step 5, for it has lost another: rank 1, RuntimeError: planted (" in lost


@pytest.mark.parametrize(("number", "most"), [(signal.SIGKILL, 15), (signal.SIGSTOP, 45)])
def test_a_rank_that_is_gone_or_hangs_ends_the_others_in_time(two, tmp_path, number, most):
    """After at most a quarter of a minute, as they are told, where nothing closes the connection."""
    run = tmp_path / "run"
    ranks = two.start(run, *TIMEOUT)
    assert reach(ranks, run, 1, 0.0)
    ranks.send(number, [1])
    sent = time.monotonic()
    try:
        assert ranks.each[0].wait() != 0
        assert time.monotonic() - sent < most
    finally:
        ranks.send(signal.SIGKILL, [1])
        ranks.codes()
    said = log_of(run).read_text()
    lost = next(line for line in said.splitlines() if line.startswith("kvtrain: error: rank 0 of 2"))
    assert "for it has lost another: the one that ended first says why above, or was killed" in lost


ACTS_ONCE = """
import os, signal
import lightning.pytorch as pl

class Act(pl.Callback):
    def __init__(self, mark: str, batch: int):
        self.mark, self.batch = mark, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank == 1 and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            ACT
"""


def torchrun(place, tmp_path: Path, act: str, batch: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under torchrun, of which the second acts once."""
    (tmp_path / "acts_once.py").write_text(ACTS_ONCE.replace("ACT", act))
    arguments = f'{{"mark": "{tmp_path / "mark"}", "batch": {batch}}}'
    callback = f'[{{"class_path": "acts_once.Act", "init_args": {arguments}}}]'
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *options]
    fit = ["-m", "kvtrain", "fit", "--config", str(place.folder / "recipe.yaml"), "--ckpt_path", "last"]
    settings = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.callbacks", callback]
    # torch's shared store has a second start find the addresses of the first (pytorch/pytorch#135712).
    surroundings = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *fit, "--trainer.devices", "2", "--trainer.strategy", "ddp", *settings],
        env={**os.environ, **surroundings, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_torchrun_starts_again_what_was_killed(place, whole_of_two, tmp_path):
    answer = torchrun(place, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 27, "--max-restarts", "1")
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert (tmp_path / "mark").exists() and "24 steps from 12" in answer.stderr
    assert_same_run(tmp_path / "run", whole_of_two)


def test_torchrun_names_the_rank_that_failed_and_its_error(place, tmp_path):
    answer = torchrun(place, tmp_path, 'raise ValueError("planted")', 3)
    assert answer.returncode != 0
    cause = answer.stderr[answer.stderr.rindex("Root Cause") :]
    assert "rank      : 1" in cause and "ValueError: planted" in cause
