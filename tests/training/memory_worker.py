"""Trains a few steps in a process of its own and prints how many bytes that took."""

import json
import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from kvtrain.models.dmc import DMC
from kvtrain.training import DMCModule, Phase, RetrofitModule
from kvtrain.training.callbacks.memory import peak_resident_bytes

STEPS = 2  # the second finds the state of the optimizer in place
STATUS = Path("/proc/self/status")


def build_module(base, *, method, steps=STEPS, **settings):
    """The module of a case, on a base folder."""
    phases = [Phase("retrofit", steps, 1e-3)]
    if method == "dmc":
        return DMCModule(base, DMC(), phases=phases, **settings)
    return RetrofitModule(base, phases=phases, **settings)


class Batches(IterableDataset):
    """The same random rows of two documents, again and again."""

    def __init__(self, rows, length):
        ids = torch.randint(3, 64, (rows, length))
        positions = torch.arange(length).repeat(rows, 1)
        self.batch = {
            "input_ids": ids,
            "labels": ids,
            "position_ids": positions % (length // 2),
            "document_ids": 1 + positions // (length // 2),
            "row_ids": torch.arange(rows),
            "num_items": rows * length,
        }

    def __iter__(self):
        while True:
            yield self.batch


def train(base, *, rows, length, precision, accumulate=1, **settings):
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=base,
    )
    trainer.fit(build_module(base, **settings), DataLoader(Batches(rows, length), batch_size=None))


def resident_bytes():
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def main():
    warm_up, base, case = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    # What the first training of a process loads and compiles is not what training takes.
    train(warm_up, **{**case, "rows": 2, "length": 32})
    before = resident_bytes()
    train(base, **case)
    print(peak_resident_bytes() - before)


if __name__ == "__main__":
    main()
