"""The road of `recipes/dmc_llama7b.yaml`, its file and command at small sizes: two hosts, killed, resumed, served."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtrain.cli import main
from tests.training.small_runs import steps_saved
from tests.training.tiny_runs import table

from .two_hosts import ADDRESSES, INTERFACE, finish, ssh_servers, start, two_hosts

RECIPE = "recipes/dmc_llama7b.yaml"
STEPS, SAVE_EVERY, KILLED_AFTER = 12, 2, 4
PHASES = {"zero_out": 3, "retrofit": 6, "finetune": 3}  # the kill lands in the second
LAUNCH, LOST = 300, 60  # seconds that a start may take, and the launcher, to see that its processes are gone
TWO_HOSTS = ["--trainer.num_nodes", "2", "--trainer.devices", "2", "--data.batch_size", "1"]
ALONE = ["--trainer.num_nodes", "1", "--trainer.devices", "1", "--data.batch_size", "4", "--trainer.strategy", "auto"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def options(run: Path) -> list[str]:
    """The recipe, and what is smaller here; strategy, method, accumulation and optimizer stay the recipe's."""
    phases = [{"name": name, "steps": steps, "learning_rate": 3e-5} for name, steps in PHASES.items()]
    smaller = {
        "trainer.default_root_dir": str(run),
        "trainer.max_steps": STEPS,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.val_check_interval": 20,
        "trainer.log_every_n_steps": 1,
        "trainer.checkpoint_every": SAVE_EVERY,
        "model.base": "kvtrain:tiny",
        "model.base_config": "null",
        "model.phases": json.dumps(phases),
        "data.tokenizer": "kvtrain:tiny",
        "data.corpus": "heldout",
        "data.validation_corpus": "heldout",
        "data.validation_rows": 4,
        "data.sequence_length": 32,
    }
    return ["--config", RECIPE, *(word for name, value in smaller.items() for word in (f"--{name}", str(value)))]


def kill_all(hosts: tuple[str, str], having: bytes = b"") -> int:
    """Kill what runs on the hosts with these words in its environment; how many there were."""
    listed = [subprocess.check_output(["ip", "netns", "pids", host], text=True).split() for host in hosts]
    found = [int(pid) for pids in listed for pid in pids if having in environment_of(pid)]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def environment_of(pid: str) -> bytes:
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended
        return b""


def kill_in_mid_run(launcher: subprocess.Popen[bytes], hosts: tuple[str, str], run: Path, log: Path) -> None:
    """Kill every rank on both hosts once there is something to go on from."""
    until = time.monotonic() + LAUNCH
    while not steps_saved(run) or steps_saved(run)[-1] < KILLED_AFTER:
        assert launcher.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)
    assert kill_all(hosts, having=b"\0LOCAL_RANK=") >= 4, log.read_text()[-3000:]


def figures(run: Path) -> list[dict[str, float]]:
    """What each step came to; the first phase has no compression yet."""
    rows = table(run / "metrics.csv")
    return [{name: row[name] for name in ("loss", "compression") if name in row} for row in rows]


@pytest.fixture
def cluster(tmp_path):
    """Starts the launcher on the first of two hosts, with the same command each time."""
    pytest.importorskip("deepspeed")
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    (tmp_path / "environment").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\n")
    environment = {"PYTHON": sys.executable, "HOSTFILE": str(tmp_path / "hostfile"), "HEAD": ADDRESSES[0]}
    words = ["bash", "launch/deepspeed.sh", "fit", *options(tmp_path / "run"), *TWO_HOSTS]
    with two_hosts() as hosts, ssh_servers(hosts, tmp_path) as ssh:
        environment |= {"DS_ENV_FILE": str(tmp_path / "environment"), "PDSH_SSH_ARGS": f"-F {ssh} -2 -a -x %h"}
        yield hosts, lambda log: start(hosts[0], words, log, **environment)
        kill_all(hosts)  # of a test that failed


def test_killed_resumed_exported_and_asked(cluster, tmp_path, capsys):
    (hosts, launch), run, log = cluster, tmp_path / "run", tmp_path / "log"
    launcher = launch(log)
    kill_in_mid_run(launcher, hosts, run, log)
    assert finish([launcher], LOST) != [0], log.read_text()[-3000:]
    saved = steps_saved(run)[-1]
    assert KILLED_AFTER <= saved < STEPS
    codes = finish([launch(log)], LAUNCH)
    said = log.read_text()
    assert codes == [0], said[-3000:]
    assert f"4 x cpu, 32-true; phases zero_out 3, retrofit 6, finetune 3; {STEPS} steps from {saved}" in said
    assert said.count(f"{STEPS} steps of {STEPS} done") == 1

    assert main(["fit", *options(tmp_path / "alone"), *ALONE]) == 0
    assert [row["step"] for row in table(run / "metrics.csv")] == list(range(STEPS))
    for ours, theirs in zip(figures(run), figures(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)

    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "exported"), "--prompt", "def add(", "--max-new-tokens", "8"]) == 0
    answer = capsys.readouterr()
    assert answer.out.strip() and "8 tokens at" in answer.err
