"""One rank of the runs without DeepSpeed: ``python -m tests.distributed.plain_worker WORLD_SIZE FOLDER``."""

import os
import sys
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kvtrain.models.duo import Duo
from kvtrain.models.host import retrofit
from kvtrain.models.lckv import LCKV
from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.heads import TransNormerForCausalLM
from kvtrain.training.parameters import clamp_parameter, whole
from tests.distributed.logged_runs import MODULES, Stop, logged_run
from tests.distributed.runs import GATE_RATE, GATE_STEPS, LENGTH, SHARING, duo_run, lckv_run
from tests.hosts import make_host, random_ids

FUSED = LCKV(kv_map="0_1_1_1_4", value_map="first", residual=True)
# By name: the model, and whether layers are recomputed in the backward pass.
CASES: dict[str, tuple[Callable[[], Any], bool]] = {
    "iterated": (lambda: shared(SHARING), False),
    "iterated, recomputed": (lambda: shared(SHARING), True),
    "fused, recomputed": (lambda: shared(FUSED), True),
    "transnormer": (lambda: transnormer("rms"), True),
    "transnormer, batch norm": (lambda: transnormer("batch"), False),
}
ROWS = 4


def shared(method: LCKV) -> Any:
    """A host whose layers share keys and values."""
    return retrofit(make_host("qwen3", layers=5), method)


def transnormer(norm: str) -> Any:
    """Of both kinds of layers; batch norm counts the tokens of all ranks."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "block_size": 5}
    config = TransNormerConfig(variant="T1", norm=norm, hidden_dropout=0.0, **sizes)
    torch.manual_seed(0)
    return TransNormerForCausalLM(config).double()


def gradients(
    case: tuple[Callable[[], Any], bool], rank: int = 0, world_size: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients over all rows, every rank reading its own; several ranks shard every layer by FSDP2."""
    build, recompute = case
    model = build().train()
    if recompute:
        model.gradient_checkpointing_enable()
    shard(model, world_size)
    ids = random_ids(ROWS, LENGTH)[rank::world_size]
    loss = model(ids, labels=ids, num_items_in_batch=ROWS * (LENGTH - 1), use_cache=False).loss
    (loss * world_size).backward()  # FSDP2 takes the mean over ranks
    total = loss.detach().clone()
    if world_size > 1:
        torch.distributed.all_reduce(total)
    named = model.named_parameters()
    return total, {name: p.grad.full_tensor() if world_size > 1 else p.grad for name, p in named}


def gates(rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Gates ``(layers, H_kv)`` before and after they are brought back, step by step, from the rows of all ranks."""
    model = retrofit(make_host("qwen3", layers=3), Duo(sink=1, recent=3)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".gates"))
    shard(model, world_size)
    stored = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids, history = torch.optim.AdamW(stored, lr=GATE_RATE), random_ids(ROWS, LENGTH)[rank::world_size], []
    for _ in range(GATE_STEPS):
        outputs: UserDict[int, tuple[Tensor, Tensor]] = UserDict()  # of a plain one FSDP2 gives layers copies
        loss = model(ids, labels=ids, num_items_in_batch=ROWS * (LENGTH - 1), use_cache=False, outputs=outputs).loss
        pull = torch.stack([gates.sum() for _, gates in outputs.values()]).sum()
        (loss * world_size + 0.001 * pull).backward()  # FSDP2 takes the mean over ranks
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack([whole(gates) for gates in stored]))
        for gate in stored:
            clamp_parameter(gate, 0.0, 1.0)
        history.append(torch.stack([whole(gates) for gates in stored]))
    return history


def shard(model: nn.Module, world_size: int) -> None:
    """FSDP2, layer by layer, where there are several ranks."""
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.model.layers.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)


def main(world_size: int, folder: Path) -> None:
    """Run everything, so that the imports are paid once, and leave the results of rank 0."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    results = {
        "ddp": lckv_run(folder, rank, world_size, "ddp"),
        "ddp gates": duo_run(folder / "duo", rank, world_size, "ddp"),
        "fsdp2 gates": gates(rank, world_size),
        "logged": {name: logged_run(folder / name, name, rank, world_size, "ddp") for name in MODULES},
        "sparse": logged_run(
            folder / "sparse", "dmc", rank, world_size, "ddp", log_every_n_steps=5, callbacks=[Stop()]
        ),
        "fsdp2": {name: gradients(case, rank, world_size) for name, case in CASES.items()},
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
