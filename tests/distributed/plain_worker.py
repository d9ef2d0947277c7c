"""One rank of the runs without DeepSpeed: ``python -m tests.distributed.plain_worker WORLD_SIZE FOLDER``."""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kvtrain.models.host import retrofit
from kvtrain.models.lckv import LCKV
from tests.distributed.runs import LENGTH, SHARING, lckv_run
from tests.hosts import make_host, random_ids

# By name: the method, and whether layers are recomputed in the backward pass.
CASES: dict[str, tuple[LCKV, bool]] = {
    "iterated": (SHARING, False),
    "iterated, recomputed": (SHARING, True),
    "fused, recomputed": (LCKV(kv_map="0_1_1_1_4", value_map="first", residual=True), True),
}
ROWS = 4


def gradients(case: tuple[LCKV, bool], rank: int = 0, world_size: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients over all rows, every rank reading its own; several ranks shard every layer by FSDP2."""
    method, recompute = case
    model = retrofit(make_host("qwen3", layers=5), method).train()
    if recompute:
        model.gradient_checkpointing_enable()
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.model.layers.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = random_ids(ROWS, LENGTH)[rank::world_size]
    loss = model(ids, labels=ids, num_items=ROWS * (LENGTH - 1), use_cache=False).loss
    (loss * world_size).backward()  # FSDP2 takes the mean over ranks
    total = loss.detach().clone()
    if world_size > 1:
        torch.distributed.all_reduce(total)
    named = model.named_parameters()
    return total, {name: p.grad.full_tensor() if world_size > 1 else p.grad for name, p in named}


def main(world_size: int, folder: Path) -> None:
    """Run everything, so that the imports are paid once, and leave the results of rank 0."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    results = {
        "ddp": lckv_run(folder, rank, world_size, "ddp"),
        "fsdp2": {name: gradients(case, rank, world_size) for name, case in CASES.items()},
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
