"""One of two ranks that meet numbers that are not finite, and count what heads merge.

``python -m tests.training.guard_worker STRATEGY FOLDER``
"""

import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from kvtrain.data.loader import PackedLoader
from kvtrain.data.packing import PackedRows
from kvtrain.training.callbacks.guard import NonFiniteError
from kvtrain.training.parameters import whole
from tests.distributed.runs import trainer as small_trainer

from .planted import PlantedFull
from .tiny_runs import BATCH, RowsData, TinyDMC, make_rows

WINDOW, STEPS, BAD, RANKS = 2, 4, 1, 2
# By their words; a stage of ZeRO stands for the configuration under which small parameters are sharded, too.
STRATEGIES: dict[str, int | str] = {"ddp": "ddp", "fsdp2": "fsdp2", "zero2": 2, "zero3": 3}


class Watch(pl.Callback):
    """Notes weights and gradient norms after every optimizer step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.norms: list[float] = []
        self.checks = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % WINDOW == 0:
            self.weights.append(flat(pl_module))
            norm = next(c.norm for c in trainer.callbacks if type(c).__name__ == "GradientNorm")
            self.norms.append(norm.item())
            self.checks &= getattr(trainer.optimizers[0], "check_grad_overflow", True)


def flat(module: Any) -> torch.Tensor:
    return torch.cat([whole(parameter).double().flatten() for _, parameter in sorted(module.model.named_parameters())])


def rows_of_the_bad_step(rows: PackedRows) -> list[list[int]]:
    """By rank and batch: rank 0's first, its second, rank 1's first, its second."""
    found = []
    for rank in range(RANKS):
        loader = PackedLoader(rows, BATCH, seed=0, window=WINDOW, rank=rank, world_size=RANKS)
        found += [batch["row_ids"].tolist() for batch in list(loader)[BAD * WINDOW : (BAD + 1) * WINDOW]]
    return found


def run(strategy: str, folder: Path, what: str, rows: PackedRows, row: int, policy: str) -> tuple[Any, Any, Watch]:
    module, watch = PlantedFull(what, row), Watch()
    start = flat_start(module)
    trainer = small_trainer(
        folder,
        RANKS,
        STRATEGIES[strategy],
        STEPS,
        WINDOW,
        non_finite=policy,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.callbacks.append(watch)
    watch.weights.append(start)
    trainer.fit(module, RowsData(rows))
    return trainer, module, watch


def flat_start(module: Any) -> torch.Tensor:
    model = module.build_model()
    return torch.cat([value.detach().double().flatten() for _, value in sorted(model.named_parameters())])


def measure(strategy: str, folder: Path, what: str, rows: PackedRows) -> dict[str, Any]:
    batches = rows_of_the_bad_step(rows)
    row = batches[2][0]
    trainer, _, watch = run(strategy, folder, what, rows, row, "skip")
    guard = next(c for c in trainer.callbacks if type(c).__name__ == "NonFiniteGuard")
    pairs = zip(watch.weights, watch.weights[1:], strict=False)
    stopped = ""
    try:
        run(strategy, folder, what, rows, row, "stop")
    except NonFiniteError as error:
        stopped = str(error)
    return {
        "moved": [not torch.equal(before, after) for before, after in pairs],
        "finite": bool(watch.weights[-1].isfinite().all()),
        "norms": watch.norms,
        "checks": watch.checks,
        "skipped": guard.skipped_steps,
        "guilty": sorted(batches[2]),
        "everyone": sorted(chain(*batches)),
        "stopped": stopped,
    }


def count_heads(folder: Path, rows: PackedRows) -> None:
    """Two steps of DMC and a validation of five rows: four on two ranks, the last on one."""
    trainer = small_trainer(
        folder,
        RANKS,
        "ddp",
        2,
        WINDOW,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=2 * WINDOW,
    )
    trainer.fit(TinyDMC(), RowsData(rows))


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    shards = folder / f"shards{rank}"
    shards.mkdir()
    rows = make_rows(shards)
    results = {what: measure(strategy, folder, what, rows) for what in ("loss", "gradient")}
    if strategy == "ddp":
        count_heads(folder / "heads", rows)
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
