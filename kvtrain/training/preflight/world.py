"""Where a process stands among the others, as its launcher says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from kvtrain.launcher import Launch
from kvtrain.training.refusals import refusals


@dataclass(frozen=True)
class World:
    """The place of a process.

    Attributes:
        rank: Among all.
        size: Of all.
        local_rank: On its node.
        node: Number of its node.
        launcher: What started it, in words; empty where nothing did.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: int = 0
    launcher: str = ""


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Ask the environment that a launcher has left, in the order in which Lightning asks.

    Under SLURM this sets ``MASTER_ADDR`` and ``MASTER_PORT`` as Lightning will.

    Raises:
        UsageError: Lightning refuses the way in which SLURM was asked.
    """
    launch = Launch.detect()
    if launch and launch.launcher == "torchrun":
        return _from_ranks("torchrun", environment, "GROUP_RANK")
    if launch and launch.launcher == "SLURM":
        with refusals():
            slurm = SLURMEnvironment()
        os.environ.update(MASTER_ADDR=slurm.main_address, MASTER_PORT=str(slurm.main_port))
        return World(slurm.global_rank(), slurm.world_size(), slurm.local_rank(), slurm.node_rank(), "SLURM")
    if environment.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        by_deepspeed = "CROSS_RANK" in environment
        launcher, node = ("deepspeed", "CROSS_RANK") if by_deepspeed else ("the environment", "NODE_RANK")
        return _from_ranks(launcher, environment, node)
    return World()


def _from_ranks(launcher: str, environment: Mapping[str, str], node: str) -> World:
    rank, size, local, number = (int(environment.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", node))
    return World(rank, size, local, number, launcher)
