"""Modules, rows and runs so small that a test sees every number of them."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.data.loader import PackedLoader
from kvtrain.data.module import data_place
from kvtrain.data.packing import Batch, PackedRows
from kvtrain.data.shards import ShardWriter, TokenShards
from kvtrain.models.dmc import DMC
from kvtrain.models.full import Full
from kvtrain.models.host import retrofit
from kvtrain.training import DMCModule, Phase, RetrofitModule
from kvtrain.training.trainer import KVTrainer
from tests.hosts import VOCAB, make_host

LENGTH, BATCH = 32, 2


class TinyDMC(DMCModule):
    """DMC from its first decision on."""

    def __init__(self) -> None:
        method = DMC(compression=2.0, window=4, init_bias=0.0)
        super().__init__("unused", method, phases=[Phase("finetune", 40, 1e-2)], seed=3)

    def build_model(self) -> Any:
        return retrofit(make_host(dtype=torch.float32), self.method)


class TinyFull(RetrofitModule):
    """A plain host."""

    def __init__(self, phases: list[Phase] | None = None) -> None:
        super().__init__("unused", Full(), phases=phases or [Phase("all", 40, 1e-2)], seed=3)

    def build_model(self) -> Any:
        return retrofit(make_host(dtype=torch.float32), self.method)


class RowsData(pl.LightningDataModule):
    """Packed rows, shuffled for training and in order for validation."""

    def __init__(self, rows: PackedRows) -> None:
        super().__init__()
        self.rows, self.tokenizer_name = rows, None

    def loader(self, seed: int | None, **settings: Any) -> PackedLoader:
        return PackedLoader(self.rows, BATCH, seed=seed, **data_place(self.trainer), **settings)

    def train_dataloader(self) -> PackedLoader:
        return self.loader(0, window=self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> PackedLoader:
        return self.loader(None, limit=5)


def make_rows(folder: Path) -> PackedRows:
    """Documents of random lengths in rows of ``LENGTH``, the last one padded."""
    writer = ShardWriter(folder, VOCAB)
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        length = int(torch.randint(2, 40, (), generator=generator))
        writer.add(torch.randint(3, VOCAB, (length,), generator=generator).tolist(), length, f"document {number}")
    writer.finish("none")
    return PackedRows(TokenShards(folder), LENGTH)


def train(module: Any, rows: PackedRows, run: Path, steps: int, ckpt_path: Path | None = None, **settings: Any) -> Any:
    """Train on one CPU process; the trainer is returned."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "check_val_every_n_epoch": None,
    }
    trainer = KVTrainer(default_root_dir=str(run), max_steps=steps, **{**defaults, **settings})
    trainer.fit(module, RowsData(rows), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module: Any) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def table(path: Path) -> list[dict[str, float]]:
    """Rows of a table of numbers, without its empty cells."""
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def rows_of_step(data: PackedLoader, step: int) -> list[Batch]:
    """The batches of one optimizer step."""
    return list(data)[step * data.window : (step + 1) * data.window]
