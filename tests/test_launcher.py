"""Processes that a launcher has started are as many as the trainer has devices on all nodes, and carry their ranks."""

import os

import pytest
from lightning.pytorch.utilities import rank_zero_only

from kvtrain.cli import main
from kvtrain.errors import UsageError
from kvtrain.launcher import Launch, adopt_local_rank, adopt_node_rank
from kvtrain.training.trainer import KVTrainer

VARIABLES = (
    *("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK"),
    *("NODE_RANK", "CROSS_RANK", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_JOB_NAME"),
    *("SLURM_LOCALID", "SLURM_NODEID"),
)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SLURM |= {"SLURM_NODEID": "1"}
# What the deepspeed launcher sets for the second process on the second of two nodes.
DEEPSPEED = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1", "CROSS_RANK": "1"}


@pytest.fixture
def surroundings(monkeypatch):
    """Sets the environment of a process and nothing else; what the process sets itself is taken back."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # trainers set it
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # so that it is restored, whatever happens to it
        monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_all
    for name in VARIABLES:
        os.environ.pop(name, None)


def trainer(devices="1", num_nodes=1):
    return KVTrainer(accelerator="cpu", devices=devices, num_nodes=num_nodes, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(
    ("variables", "devices", "num_nodes", "words"),
    [
        (TORCHRUN, 1, 1, "torchrun counts 2 processes, 2 on each node, and the trainer is to have 1 on 1"),
        (TORCHRUN, "auto", 1, "give --trainer.devices 2 --trainer.num_nodes 1"),
        (TORCHRUN, 4, 1, "to have 4 on 1"),
        (TORCHRUN, 1, 2, "give --trainer.devices 2 --trainer.num_nodes 1"),
        (TORCHRUN | {"WORLD_SIZE": "4"}, 4, 1, "give --trainer.devices 2 --trainer.num_nodes 2"),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}, 2, 1, "counts 1 processes"),
        (SLURM, 2, 1, "SLURM counts 4 processes, 2 on each node"),
        (SLURM, 1, 1, "give --trainer.devices 2 --trainer.num_nodes 2"),
        (DEEPSPEED, 2, 1, "the launcher counts 4 processes, 2 on each node"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 1, 1, "counts 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, 1, 2, "calls this process rank 1 of 2, and by node and"),
    ],
)
def test_another_number_of_processes_is_refused(surroundings, variables, devices, num_nodes, words):
    surroundings(variables)
    with pytest.raises(UsageError) as refusal:
        trainer(devices, num_nodes)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("variables", "devices", "num_nodes", "rank"),
    [
        ({}, 1, 1, 0),
        ({}, 2, 1, 0),  # Lightning will start the other one
        (TORCHRUN, 2, 1, 1),
        (TORCHRUN | {"WORLD_SIZE": "4", "RANK": "3", "GROUP_RANK": "1"}, 2, 2, 3),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1, 1, 0),
        (SLURM, 2, 2, 3),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, 1, 1, 0),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, 2, 1, 0),
        (TORCHRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 2, 1, 1),
        (DEEPSPEED, 2, 2, 3),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "NODE_RANK": "1", "LOCAL_RANK": "0"}, 1, 2, 1),
        ({"WORLD_SIZE": "7"}, 1, 1, 0),  # nobody's: a launcher gives ranks
    ],
)
def test_as_many_processes_as_the_trainer_has_devices(surroundings, variables, devices, num_nodes, rank):
    surroundings({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | variables)
    assert trainer(devices, num_nodes).global_rank == rank


def test_nothing_is_written_where_the_number_is_wrong(surroundings, tmp_path, monkeypatch, capsys):
    surroundings(TORCHRUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVTRAIN_CACHE", str(tmp_path / "cache"))
    options = ["--model", "RetrofitModule", "--model.base", "kvtrain:copy", "--trainer.accelerator", "cpu"]
    phases = '[{"name": "all", "steps": 1, "learning_rate": 0.1}]'
    assert main(["fit", *options, "--model.phases", phases, "--trainer.max_steps", "1", "--trainer.devices", "1"]) == 2
    assert "give --trainer.devices 2 --trainer.num_nodes 1" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_deepspeed_launcher_names_the_local_rank_before_the_command(surroundings, capsys):
    assert main(["--local_rank=1", "recipes"]) == 0
    assert "recipes" in capsys.readouterr().out
    assert os.environ["LOCAL_RANK"] == "1"
    assert adopt_local_rank(["--local-rank=0", "--config", "r.yaml"]) == ["--config", "r.yaml"]
    assert os.environ["LOCAL_RANK"] == "1"  # what the environment says comes first


def test_a_node_rank_of_ones_own_comes_first(surroundings):
    surroundings({"CROSS_RANK": "1", "NODE_RANK": "0"})
    adopt_node_rank()
    assert os.environ["NODE_RANK"] == "0"


def test_numbers_that_are_none_are_taken_for_absent(surroundings):
    surroundings({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "", "SLURM_PROCID": "x"})
    assert Launch.detect() == Launch("SLURM", 4, None, 0)
