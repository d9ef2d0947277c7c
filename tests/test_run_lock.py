"""A run folder has one owner; one that is gone is known by its process number and when the process began."""

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kvtrain.errors import UsageError
from kvtrain.run_lock import FILE_NAME, Owner, run_lock
from tests.processes import PATIENCE, Forked

# Whoever starts Python may have it ignore Ctrl-C, in the background, or a closed terminal, as nohup does.
HOLD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from pathlib import Path
from kvtrain.errors import UsageError
from kvtrain.run_lock import run_lock
from kvtrain.stop_signals import StopSignals

try:
    with StopSignals(), run_lock(Path(sys.argv[1])):
        print("holds", flush=True)
        time.sleep(float(sys.argv[2]))
except UsageError:
    print("refused", flush=True)
"""


@pytest.fixture
def neighbor():
    """A process that is alive, and what it would be as an owner."""
    process = subprocess.Popen(["sleep", "600"])
    mine = Owner.this_process()
    Path(f"/proc/{process.pid}/stat").read_text()
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    yield process, replace(mine, pid=process.pid, started=f"{mine.started.split()[0]} {fields[19]}")
    process.kill()
    process.wait()


def hold(run: Path, owner: Owner | str) -> Path:
    run.mkdir(exist_ok=True)
    (run / FILE_NAME).write_text(owner if isinstance(owner, str) else json.dumps(asdict(owner)))
    return run / FILE_NAME


def wait_for(ready) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_owner_stands_in_the_folder_and_leaves_nothing_behind(tmp_path):
    run = tmp_path / "runs" / "new"
    with run_lock(run):
        assert [path.name for path in run.iterdir()] == [FILE_NAME]
        owner = Owner(**json.loads((run / FILE_NAME).read_text()))
        assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())
        assert owner.since.startswith(time.strftime("%Y-%m-%d "))
    assert not list(tmp_path.iterdir())


def test_what_was_written_stays(tmp_path):
    def fail():
        with run_lock(tmp_path / "run"):
            (tmp_path / "run" / "config.yaml").write_text("")
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_living_owner_is_not_disturbed(tmp_path, neighbor):
    process, owner = neighbor
    lock = hold(tmp_path, owner)
    begin = time.monotonic()
    with pytest.raises(UsageError, match=f"in use by process {process.pid} on .* since .*delete .*{FILE_NAME}"):
        run_lock(tmp_path).__enter__()
    assert time.monotonic() - begin < 2
    assert [path.name for path in tmp_path.iterdir()] == [lock.name]
    process.kill()  # and is buried only later
    wait_for(owner.is_gone)
    with run_lock(tmp_path):
        pass


def test_a_number_that_was_given_again_is_another_process(tmp_path, neighbor, caplog):
    process, owner = neighbor
    for started in ("0 1", f"{owner.started.split()[0]} 1", f"another-boot {owner.started.split()[1]}"):
        hold(tmp_path, replace(owner, started=started))
        with run_lock(tmp_path):
            assert Owner(**json.loads((tmp_path / FILE_NAME).read_text())).pid == os.getpid()
        assert f"process {process.pid} of {owner.host} is gone, taken over" in caplog.messages[-1]
    hold(tmp_path, replace(owner, started=None))  # nobody can say
    with pytest.raises(UsageError, match="in use"):
        run_lock(tmp_path).__enter__()


def test_this_process_was_another_before_it_was_started_anew(tmp_path):
    hold(tmp_path, Owner.this_process())
    with run_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\x00"])
def test_another_host_and_what_cannot_be_read_are_left_alone(tmp_path, content):
    lock = hold(tmp_path, content)
    with pytest.raises(UsageError, match=f"another process, says .*delete {lock}"):
        run_lock(tmp_path).__enter__()
    hold(tmp_path, replace(Owner.this_process(), host="elsewhere"))
    with pytest.raises(UsageError, match="on elsewhere since"):
        run_lock(tmp_path).__enter__()


def test_a_lock_that_somebody_deleted_and_took_is_not_ours_to_delete(tmp_path):
    foreign = json.dumps(asdict(replace(Owner.this_process(), host="elsewhere")))
    with run_lock(tmp_path):
        (tmp_path / FILE_NAME).write_text(foreign)
    assert (tmp_path / FILE_NAME).read_text() == foreign


def test_without_hard_links_the_file_is_created_exclusively(tmp_path, monkeypatch, neighbor):
    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    with run_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    hold(tmp_path, neighbor[1])
    with pytest.raises(UsageError, match="in use"):
        run_lock(tmp_path).__enter__()


def test_a_job_that_slurm_starts_again_takes_over_from_its_lost_machine(tmp_path, monkeypatch, caplog):
    lost = replace(Owner.this_process(), host="elsewhere", job="17", restarts=1)
    for job, restarts, goes_on in (("17", "2", True), ("17", "1", False), ("18", "2", False)):
        hold(tmp_path, lost)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        if goes_on:
            with run_lock(tmp_path):
                assert "of elsewhere is gone, taken over" in caplog.messages[-1]
        else:
            with pytest.raises(UsageError, match="on elsewhere since"):
                run_lock(tmp_path).__enter__()


def test_what_is_held_may_be_held_again(tmp_path, caplog):
    with run_lock(tmp_path):
        with run_lock(tmp_path / "." / "new" / ".."):
            assert (tmp_path / FILE_NAME).exists()
        assert (tmp_path / FILE_NAME).exists()
    assert not list(tmp_path.iterdir()) and not caplog.messages


def test_drafts_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path, neighbor):
    process, _ = neighbor
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine, theirs = socket.gethostname(), f"{socket.gethostname()}.elsewhere"
    for name in (f"{mine}.{dead.pid}", f"{mine}.{dead.pid}.stale", f"{mine}.{process.pid}", f"{theirs}.x"):
        (tmp_path / f".{FILE_NAME}.{name}").touch()
    with run_lock(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        f".{FILE_NAME}.{mine}.{process.pid}",
        f".{FILE_NAME}.{theirs}.x",
    }


@pytest.mark.roads
def test_of_many_one_takes_over(tmp_path, neighbor):
    hold(tmp_path / "run", replace(neighbor[1], started="0 1"))
    logs = [tmp_path / f"log{number}" for number in range(6)]
    for log in [Forked(HOLD, [str(tmp_path / "run"), "3"], log) for log in logs]:
        assert log.wait() == 0
    assert sorted(log.read_text().split()[-1] for log in logs) == ["holds", *["refused"] * 5]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.roads
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_lets_go_or_leaves_what_can_be_taken_over(tmp_path, number):
    run, log = tmp_path / "run", tmp_path / "log"
    process = Forked(HOLD, [str(run), "600"], log)
    wait_for(lambda: log.exists() and "holds" in log.read_text())
    os.kill(process.pid, number)
    code = process.wait()
    if number == signal.SIGKILL:
        assert (run / FILE_NAME).exists()
        with run_lock(run):
            pass
        assert not list(run.iterdir())
    else:
        assert code == (1 if number == signal.SIGINT else 128 + signal.SIGTERM)
        assert not run.exists()
