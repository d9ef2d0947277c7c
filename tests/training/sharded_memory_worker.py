"""One rank that trains a few steps under a strategy and leaves how many bytes the last one took at most.

``python -m tests.training.sharded_memory_worker WORLD_SIZE FOLDER CASE``
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from kvtrain.training import strategies
from kvtrain.training.callbacks.memory import peak_resident_bytes

from .memory_worker import STEPS, Batches, build_module, resident_bytes

# Small ones, so that what is divided is most of what is held.
ZERO = {"contiguous_gradients": True, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 1_000_000}
ZERO3 = {"stage3_prefetch_bucket_size": 500_000, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 1000}


def zero_settings(name):
    """DeepSpeed's ``zero_optimization``, for the estimate and for the run."""
    return {**ZERO, **(ZERO3 if name == "zero3" else {}), "stage": int(name[-1])}


def strategy(name):
    if name == "ddp":
        return name
    if name == "fsdp2":
        return strategies.FSDP2()
    config = {"zero_optimization": zero_settings(name), "data_types": {"grad_accum_dtype": "fp32"}}
    return strategies.DeepSpeedZeRO(
        {**config, "communication_data_type": "fp32", "zero_allow_untested_optimizer": True}
    )


class LastStep(pl.Callback):
    """Forgets how much the steps before the last one and loading took."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.steps - 1:
            Path("/proc/self/clear_refs").write_text("5")


def train(base, world_size, *, name, rows, length, precision, **settings):
    steps = STEPS + (name == "ddp")  # whose buckets are others from the second step on
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy(name),
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LastStep(steps)],
    )
    module = build_module(base, method="full", steps=steps, **settings)
    trainer.fit(module, DataLoader(Batches(rows, length), batch_size=None))


def main(world_size, folder, case):
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    train(str(folder / "small"), world_size, **{**case, "rows": 2, "length": 32})
    before = resident_bytes()
    train(str(folder / "large"), world_size, **case)
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(peak_resident_bytes() - before, folder / "results.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
