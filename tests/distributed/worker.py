"""One rank of the runs under DeepSpeed: ``python -m tests.distributed.worker WORLD_SIZE FOLDER STAGE CLIP``."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kvtrain.training.parameters import zero_rows
from tests.distributed.runs import dmc_run, duo_run, lckv_run, sgd_step


def sharded_rows(world_size: int) -> torch.Tensor:
    """Zero rows of a sharded matrix whose rows the ranks do not divide evenly."""
    mesh = init_device_mesh("cpu", (world_size,))
    matrix = torch.nn.Parameter(distribute_tensor(torch.ones(7, 3), mesh, [Shard(0)]))
    zero_rows(matrix, slice(2, None, 3))
    return matrix.full_tensor().detach()


def main(world_size: int, folder: Path, stage: int, clip: float) -> None:
    """Run everything, so that the imports are paid once, and leave the results of rank 0."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    place = (rank, world_size, stage)
    results = {
        "free": sgd_step(folder, *place, None),
        "clipped": sgd_step(folder, *place, clip),
        "dmc": dmc_run(folder / "dmc", *place),
        # Qwen2 has biases; keys' are no match for a comparison of weights, their gradients being mere rounding.
        "half": dmc_run(folder / "half", *place, "qwen2", precision="bf16-mixed", enable_checkpointing=False),
        "lckv": lckv_run(folder / "lckv", *place),
        "duo": duo_run(folder / "duo", *place),
        "sharded": sharded_rows(world_size),
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
