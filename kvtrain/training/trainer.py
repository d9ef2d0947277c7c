"""Lightning's trainer with the parts that every run of kvtrain has."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from kvtrain.training.callbacks import StepSeeding, Throughput, TokenProgress
from kvtrain.training.callbacks.checkpoints import RunCheckpoint
from kvtrain.training.callbacks.gates import HeadGates
from kvtrain.training.callbacks.gradients import GradientNorm
from kvtrain.training.callbacks.guard import NonFiniteGuard
from kvtrain.training.callbacks.heads import HeadCompression
from kvtrain.training.callbacks.memory import PeakMemory
from kvtrain.training.callbacks.opening import OpeningLine
from kvtrain.training.callbacks.preemption import Preemption
from kvtrain.training.callbacks.threads import ThreadCount
from kvtrain.training.metrics import CSVMetrics

DEFAULT_RUN = "runs/unnamed"
# A bare `off` in a recipe is false: YAML says so.
NonFinitePolicy = Literal["off", "skip", "stop"] | Literal[False]


class KVTrainer(pl.Trainer):
    """Lightning's trainer with kvtrain's standing parts: metrics, progress, seeding, checkpoints.

    A run folder is ``default_root_dir``; it holds ``config.yaml``, ``metrics.csv`` and ``checkpoints/``.

    Args:
        checkpoint_every: Optimiser steps between checkpoints.
        num_threads: CPU threads of torch; None leaves torch's own choice.
        non_finite: What to do when a loss or the gradient is not finite: end the run, skip the optimiser step, or
            look away (``off``).
        peak_flops: Dense FLOP/s of one device in the run's precision, for ``mfu`` and ``hfu``; None knows common
            GPUs, and logs neither on others.
        **settings: See ``lightning.pytorch.Trainer``.

    Raises:
        ValueError: A number is not positive, or ``non_finite`` none of the three.
    """

    def __init__(
        self,
        *,
        checkpoint_every: int = 100,
        num_threads: int | None = None,
        non_finite: NonFinitePolicy = "stop",
        peak_flops: float | None = None,
        **settings: Any,
    ) -> None:
        if num_threads is not None:
            if num_threads < 1:
                raise ValueError(f"trainer.num_threads must be at least 1, not {num_threads}")
            torch.set_num_threads(num_threads)
        run = Path(settings.get("default_root_dir") or DEFAULT_RUN)
        settings["default_root_dir"] = str(run)
        standing = [*_observers(run, peak_flops), *_guards(non_finite), *_keepers(run, checkpoint_every, settings)]
        settings["callbacks"] = [*_as_list(settings.get("callbacks")), *standing]
        settings["logger"] = _loggers(run, settings.get("logger"))
        if settings.get("enable_model_summary") is None:
            settings["enable_model_summary"] = False
        super().__init__(**settings)


def _observers(run: Path, peak_flops: float | None) -> list[pl.Callback]:
    heads = [HeadCompression(run), HeadGates(run)]
    return [StepSeeding(), Throughput(peak_flops), PeakMemory(), *heads, ThreadCount(), OpeningLine()]


def _guards(non_finite: NonFinitePolicy) -> list[pl.Callback]:
    gradients = GradientNorm()
    if non_finite is False or non_finite == "off":
        return [gradients]
    return [gradients, NonFiniteGuard(non_finite, gradients)]


def _keepers(run: Path, checkpoint_every: int, settings: dict[str, Any]) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = [Preemption()]
    if settings.get("enable_progress_bar") is not False:
        callbacks.append(TokenProgress())
    if settings.get("enable_checkpointing") is not False:
        callbacks.append(RunCheckpoint(run, checkpoint_every))
    return callbacks


def _loggers(run: Path, asked: Any) -> list[Logger] | bool:
    """``metrics.csv`` always, beside what the recipe asks for; ``False`` turns everything off."""
    if asked is False:
        return False
    return [CSVMetrics(str(run)), *([] if asked is True else _as_list(asked))]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
