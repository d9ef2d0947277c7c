"""What a launcher says of this process in its environment: one of how many it is, and which."""

import os
from dataclasses import dataclass

from kvtrain.errors import UsageError

_LOCAL_RANK_FLAGS = ("--local_rank", "--local-rank")
_INTERACTIVE_JOBS = ("bash", "interactive")  # names of SLURM's jobs that are somebody's shell; Lightning's rule


@dataclass(frozen=True)
class Launch:
    """Processes that a launcher has started for one run.

    Attributes:
        launcher: Its name.
        world_size: Processes on all nodes.
        local_world_size: Processes on this node; None where it does not say.
        rank: Of this process among all.
    """

    launcher: str
    world_size: int
    local_world_size: int | None
    rank: int

    @classmethod
    def detect(cls) -> "Launch | None":
        """The launch that this process belongs to; None where it was started by itself.

        Processes that Lightning starts have no ``RANK``: they are as many as the recipe says.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return cls._read("torchrun", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")
        if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE_JOBS:
            return cls._read("SLURM", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID")
        if {"WORLD_SIZE", "RANK"} <= os.environ.keys():
            return cls._read("the launcher", "WORLD_SIZE", "LOCAL_SIZE", "RANK")
        return None

    @classmethod
    def _read(cls, launcher: str, world_size: str, local_world_size: str, rank: str) -> "Launch":
        return cls(launcher, _number(world_size) or 1, _number(local_world_size), _number(rank) or 0)

    def check(self, devices: int, num_nodes: int, rank: int) -> None:
        """Make sure that the trainer's idea of its processes is the launcher's.

        Args:
            devices: Of the trainer, on each node.
            num_nodes: Of the trainer.
            rank: That the trainer takes this process for.

        Raises:
            UsageError: It is another one: every process would train for itself, or wait for others that never come.
        """
        local = self.local_world_size or self.world_size // num_nodes or 1
        if (self.world_size, local) != (devices * num_nodes, devices):
            nodes = self.world_size // local
            raise UsageError(
                f"{self.launcher} counts {self.world_size} processes, {local} on each node, and the trainer is to have "
                f"{devices} on {num_nodes}; give --trainer.devices {local} --trainer.num_nodes {nodes}"
            )
        if self.rank != rank:
            raise UsageError(
                f"{self.launcher} calls this process rank {self.rank} of {self.world_size}, and by node and local rank "
                f"it is {rank}; set NODE_RANK on each node and LOCAL_RANK for each process, or use torchrun"
            )


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None


def adopt_local_rank(arguments: list[str]) -> list[str]:
    """Take out the ``--local_rank`` that the deepspeed launcher adds, before all other words, and export it instead."""
    rest: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if equals and name in _LOCAL_RANK_FLAGS:
            os.environ.setdefault("LOCAL_RANK", value)
        else:
            rest.append(word)
    return rest


def adopt_node_rank() -> None:
    """Give the node the number that the deepspeed launcher has for it, by the name under which Lightning looks."""
    if "CROSS_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["CROSS_RANK"])
