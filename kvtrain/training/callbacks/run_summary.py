"""What a run begins with: its recipe in the run folder, and the line that says what is about to happen."""

import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from kvtrain import run_folder
from kvtrain.data.module import data_place
from kvtrain.kernels.dispatch import cpu_has_bfloat16
from kvtrain.metrics import METRICS
from kvtrain.training.base import TrainingModule
from kvtrain.training.csv_logger import CSVMetrics
from kvtrain.training.ranks import require_same_step
from kvtrain.training.strategies.base import totals, traits

logger = logging.getLogger("kvtrain")


class RunRecord(pl.Callback):
    """Writes ``config.yaml`` when the first step is about to be taken.

    Until then a recipe may still be refused, for its corpus, its model or its devices, and leaves no run behind.

    Args:
        run: Run folder.
        recipe: The whole recipe as YAML.
        resumes: Whether the folder's metrics are this run's own.
        damaged: Checkpoints that were passed over, to be set aside.

    Attributes:
        begun: Whether training has begun.
    """

    def __init__(self, run: Path, recipe: str, *, resumes: bool, damaged: Sequence[Path] = ()) -> None:
        self.run, self.recipe, self.resumes, self.damaged = run, recipe, resumes, damaged
        self.begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        self.begun = True
        require_same_step(trainer)  # before anything of the run is replaced
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for checkpoint in self.damaged:
            run_folder.quarantine(checkpoint)
        if not self.resumes:
            (self.run / METRICS.name).unlink(missing_ok=True)
        run_folder.write_config(self.run, self.recipe)
        for logger in trainer.loggers:
            logger.log_hyperparams(run_folder.parse_config(self.recipe))


class RunSummary(pl.Callback):
    """Says once what trains, how large it is, where, for how long, and into which folder, and takes up its metrics."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it, and let the module write its own part of the record."""
        assert isinstance(pl_module, TrainingModule)
        for metrics in trainer.loggers:
            if isinstance(metrics, CSVMetrics):
                metrics.take_up(trainer.global_step)
        if trainer.is_global_zero:
            pl_module.write_record(Path(trainer.default_root_dir))
        logger.info("%s", run_summary_line(trainer, pl_module))
        if (
            trainer.strategy.root_device.type == "cpu"
            and trainer.precision.startswith("bf16")
            and not cpu_has_bfloat16()
        ):
            logger.warning(
                "this CPU has no instructions for bfloat16: products in %s take many times as long as in float32; "
                "set --trainer.precision 32-true",
                trainer.precision,
            )


def run_summary_line(trainer: pl.Trainer, module: TrainingModule) -> str:
    """One line of facts about a run that begins or goes on."""
    total, trainable = totals(traits(module.trainer).parameter_sizes(module.model))
    trained = "" if trainable == total else f" ({trainable:,} train)"
    phases = ", ".join(f"{phase.name} {phase.steps:,}" for phase in module.schedule.phases)
    begin = f" from {trainer.global_step:,}" if trainer.global_step else ""
    return "; ".join(
        [
            f"{type(module).__name__}: {total:,} parameters{trained}",
            f"{trainer.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}",
            f"phases {phases}",
            f"{trainer.max_steps:,} steps{begin}{_tokens_a_step(trainer)}",
            f"run folder {Path(trainer.default_root_dir)}",
        ]
    )


def _tokens_a_step(trainer: pl.Trainer) -> str:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "batch_size") or not hasattr(data, "sequence_length"):
        return ""
    rows = data.batch_size * data_place(trainer)["world_size"]
    tokens = rows * data.sequence_length * trainer.accumulate_grad_batches
    return f" of {tokens:,} tokens"
