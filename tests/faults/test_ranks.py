"""Two ranks, of which one gets a signal, fails, is killed or hangs: all end, soon, and say which one it was."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtrain import run_folder
from tests.processes import PATIENCE, ROOT, Forked
from tests.training.small_runs import acting

from .runs import assert_same_run, log_of, reach

pytestmark = [pytest.mark.roads, pytest.mark.timeout(900)]
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture(autouse=True)
def _local(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def start(place, run: Path, monkeypatch, *options: list[str]) -> list[Forked]:
    """Two ranks, as a launcher starts them, each with options of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(2):
        with monkeypatch.context() as patch:
            for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)}.items():
                patch.setenv(name, value)
            ranks.append(place.start(run, *TWO, *(options[rank] if options else [])))
    return ranks


@pytest.fixture(scope="module")
def whole_of_two(place, tmp_path_factory):
    """What two ranks come to that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole-of-two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        assert [rank.wait() for rank in start(place, run, patch)] == [0, 0], log_of(run).read_text()[-3000:]
    return run


def test_one_rank_s_signal_counts_for_all(place, whole_of_two, tmp_path, monkeypatch):
    run = tmp_path / "run"
    ranks = start(place, run, monkeypatch, [], acting(int(signal.SIGUSR1), 9))
    assert [rank.wait() for rank in ranks] == [143, 143]
    assert run_folder.step_of(run_folder.last_checkpoint(run)) == 5
    assert log_of(run).read_text().count("SIGUSR1 at step 5: saved; continue with --ckpt_path last") == 1
    assert [rank.wait() for rank in start(place, run, monkeypatch)] == [0, 0]
    assert_same_run(run, whole_of_two)


def test_a_rank_that_fails_is_named_with_its_error(place, tmp_path, monkeypatch):
    run = tmp_path / "run"
    ranks = start(place, run, monkeypatch, [], acting("crash", 9))
    codes, said = [rank.wait() for rank in ranks], log_of(run).read_text()
    assert 0 not in codes
    assert "kvtrain: error: rank 1 of 2 ends at step 5: RuntimeError: planted" in said
    lost = next(line for line in said.splitlines() if line.startswith("kvtrain: error: rank 0 of 2"))
    assert "ends at step 5, for it has lost another: rank 1, RuntimeError: planted (" in lost


@pytest.mark.parametrize(("number", "most"), [(signal.SIGKILL, 15), (signal.SIGSTOP, 45)])
def test_a_rank_that_is_gone_or_hangs_ends_the_others_in_time(place, tmp_path, monkeypatch, number, most):
    """After at most a quarter of a minute, as they are told, where nothing closes the connection."""
    run = tmp_path / "run"
    ranks = start(place, run, monkeypatch, *[["--trainer.timeout_minutes", "0.25"]] * 2)
    assert reach(ranks[0], run, 1, 0.0)
    os.kill(ranks[1].pid, number)
    sent = time.monotonic()
    try:
        assert ranks[0].wait() != 0
        assert time.monotonic() - sent < most
    finally:
        if ranks[1].poll() is None:
            os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[1].wait()
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
    fit = ["-m", "kvtrain", "fit", "--config", str(place.folder / "recipe.yaml"), "--ckpt_path", "last", *TWO]
    settings = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.callbacks", callback]
    return subprocess.run(
        [sys.executable, *launcher, *fit, *settings],
        # torch's shared store has a second start find the addresses of the first (pytorch/pytorch#135712).
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
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
