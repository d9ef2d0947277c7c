"""The launchers over two hosts of two processes each, against one process."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from kvtrain import run_folder
from tests.training.small_runs import fit, recipe_text, write_place
from tests.training.tiny_runs import table

from .two_hosts import ADDRESSES, INTERFACE, finish, ssh_servers, start, two_hosts

STEPS, SAVED = 9, 6
ONE = ["--data.batch_size", "4"]
FOUR = ["--data.batch_size", "1", "--trainer.num_nodes", "2", "--trainer.devices", "2"]


@pytest.fixture
def place(tmp_path):
    write_place(tmp_path)
    return tmp_path


def write_recipe(place: Path, run: str, **trainer: object) -> Path:
    recipe = yaml.safe_load(recipe_text(place, place / run))
    recipe["trainer"] |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, **trainer}
    path = place / f"{run}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def torchrun(hosts, place, command: str, *options: str, **environment: str) -> tuple[list[int], str]:
    """The script on both hosts; exit codes, and what the first one said."""
    shared = {"PYTHON": sys.executable, "HEAD": ADDRESSES[0], "NODES": "2", "DEVICES": "2", **environment}
    nodes = [
        start(
            host,
            ["bash", "launch/torchrun.sh", command, *options],
            place / f"log{number}",
            **{**shared, "NODE_RANK": str(number), "NODE_ADDRESS": ADDRESSES[number]},
        )
        for number, host in enumerate(hosts)
    ]
    codes = finish(nodes, 240)
    return codes, (place / "log0").read_text()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_folder.last_checkpoint(run), weights_only=True)["state_dict"]


def gradient_norms(run: Path) -> list[float]:
    return [row["gradient_norm"] for row in table(run / "metrics.csv")]


@pytest.mark.roads
def test_torchrun_trains_on_two_hosts_what_one_process_trains(place):
    alone = write_recipe(place, "alone")
    assert fit(alone, *ONE, "--trainer.max_steps", str(STEPS)) == 0
    recipe = write_recipe(place, "run")
    options = ["--config", str(recipe), *FOUR, "--trainer.max_steps", str(SAVED)]
    with two_hosts() as hosts:
        codes, said = torchrun(hosts, place, "fit", *options, GLOO_SOCKET_IFNAME=INTERFACE)
    assert codes == [0, 0], said[-3000:]
    assert "4 x cpu" in said and said.count("6 steps of 6 done") == 1
    run = place / "run"
    assert [path.name for path in run_folder.step_files(run)] == ["step-000003.ckpt", "step-000006.ckpt"]
    assert not list((run / "checkpoints").glob(".*"))
    last = table(run / "metrics.csv")[-1]
    assert 0 < last["tokens_per_second_least"] <= last["tokens_per_second"] / 4 <= last["tokens_per_second_most"]
    # As the script would, on one host: what was begun on two goes on.
    assert fit(recipe, "--ckpt_path", "last", *ONE, "--trainer.max_steps", str(STEPS)) == 0
    ours, theirs = weights(run), weights(place / "alone")
    assert ours.keys() == theirs.keys()
    # As one vector: AdamW makes whole steps of a gradient that is nothing but rounding.
    astray = torch.cat([(ours[name] - tensor).flatten() for name, tensor in theirs.items()]).norm()
    assert astray < 1e-5 * torch.cat([tensor.flatten() for tensor in theirs.values()]).norm()
    assert gradient_norms(run) == pytest.approx(gradient_norms(place / "alone"), rel=1e-4)


@pytest.mark.slow
def test_check_says_by_which_interface_hosts_reach_each_other(place):
    options = ["--config", str(write_recipe(place, "run")), *FOUR]
    with two_hosts() as hosts:
        codes, said = torchrun(hosts, place, "check", *options)
        assert codes == [1, 1]  # torchrun's own; each process leaves with 2
        assert f"export GLOO_SOCKET_IFNAME={INTERFACE} on all nodes" in said, said
        codes, said = torchrun(hosts, place, "check", *options, GLOO_SOCKET_IFNAME=INTERFACE)
        assert codes == [0, 0], said
    assert "4 on 2 nodes, by torchrun" in said and "16.0 MiB in " in said
    assert all(f"at {address} ({INTERFACE})" in said for address in ADDRESSES)
    assert not (place / "run").exists()


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_on_two_hosts_what_one_process_trains(place):
    pytest.importorskip("deepspeed")
    alone = write_recipe(place, "alone")
    assert fit(alone, *ONE, "--trainer.max_steps", str(SAVED)) == 0
    zero = {"class_path": "kvtrain.training.strategies.DeepSpeedZeRO"}
    zero["init_args"] = {"config": "configs/deepspeed/zero2.json"}
    recipe = write_recipe(place, "run", strategy=zero)
    (place / "hostfile").write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    (place / "environment").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\n")
    environment = {"PYTHON": sys.executable, "HOSTFILE": str(place / "hostfile"), "HEAD": ADDRESSES[0]}
    options = ["--config", str(recipe), *FOUR, "--trainer.max_steps", str(SAVED)]
    with two_hosts() as hosts, ssh_servers(hosts, place) as ssh:
        environment |= {"DS_ENV_FILE": str(place / "environment"), "PDSH_SSH_ARGS": f"-F {ssh} -2 -a -x %h"}
        launcher = start(hosts[0], ["bash", "launch/deepspeed.sh", "fit", *options], place / "log", **environment)
        codes = finish([launcher], 280)
    said = (place / "log").read_text()
    assert codes == [0], said[-3000:]
    assert "4 x cpu" in said and said.count("6 steps of 6 done") == 1
    assert [path.name for path in run_folder.step_files(place / "run")] == ["step-000003.ckpt", "step-000006.ckpt"]
    assert gradient_norms(place / "run") == pytest.approx(gradient_norms(place / "alone"), rel=1e-3)
