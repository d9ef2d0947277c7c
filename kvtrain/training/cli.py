"""``kvtrain fit`` and ``kvtrain validate``: Lightning's CLI with our defaults and short error messages."""

import difflib
import re
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from kvtrain.data.module import PackedDataModule
from kvtrain.training.base import TrainingModule
from kvtrain.training.callbacks import StepSeeding, Throughput, TokenProgress
from kvtrain.training.metrics import CSVMetrics

CHECKPOINTS = "checkpoints"


class RecipeParser(LightningArgumentParser):
    """Answers mistakes in a line or two."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and the cause, without the usage page."""
        raise SystemExit(f"{message}")


class KVTrainer(pl.Trainer):
    """Lightning's trainer with kvtrain's standing parts: metrics, progress, seeding, checkpoints.

    A run folder is ``default_root_dir``; it holds ``config.yaml``, ``metrics.csv`` and ``checkpoints/``.
    """

    def __init__(self, *, checkpoint_every: int = 100, **settings: Any) -> None:
        folder = settings.get("default_root_dir") or "runs/unnamed"
        settings["default_root_dir"] = str(folder)
        checkpoints = ModelCheckpoint(
            dirpath=Path(folder) / CHECKPOINTS,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=checkpoint_every,
            save_last=True,
        )
        standing: list[pl.Callback] = [StepSeeding(), Throughput(), TokenProgress(), checkpoints]
        settings["callbacks"] = [*(settings.get("callbacks") or []), *standing]
        if settings.get("logger") in (None, True):
            settings["logger"] = CSVMetrics(str(folder))
        settings.setdefault("enable_model_summary", False)
        super().__init__(**settings)


class RecipeCLI(LightningCLI):
    """Reads a recipe and runs it."""

    def before_fit(self) -> None:
        torch.set_num_threads(torch.get_num_threads())


def main(arguments: list[str]) -> None:
    RecipeCLI(
        TrainingModule,
        PackedDataModule,
        trainer_class=KVTrainer,
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        args=arguments,
    )
