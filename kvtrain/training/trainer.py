"""Lightning's trainer with the parts that every run of kvtrain has."""

import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from kvtrain.errors import require_at_least, require_finite
from kvtrain.training.callbacks import StepSeeding, Throughput, TokenProgress
from kvtrain.training.callbacks.checkpoints import RunCheckpoint
from kvtrain.training.callbacks.gradients import GradientNorm
from kvtrain.training.callbacks.guard import NonFiniteGuard
from kvtrain.training.callbacks.memory import PeakMemory
from kvtrain.training.callbacks.preemption import Preemption
from kvtrain.training.callbacks.run_summary import RunSummary
from kvtrain.training.callbacks.threads import ThreadCount
from kvtrain.training.csv_logger import CSVMetrics
from kvtrain.training.strategies import WORDS

DEFAULT_RUN = "runs/unnamed"
_MANY = 64
# Of what tells a process of its peers on other nodes; without one it would wait for them for half an hour.
_LAUNCHERS = {"MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "num_threads": 1,
}
# A bare `off` in a recipe is false: YAML says so.
NonFinitePolicy = Literal["off", "skip", "stop"] | Literal[False]


class KVTrainer(pl.Trainer):
    """Lightning's trainer with kvtrain's standing parts: metrics, progress, seeding, checkpoints.

    A run folder is ``default_root_dir``; it holds ``config.yaml``, ``metrics.csv`` and ``checkpoints/``.

    Args:
        checkpoint_every: Optimizer steps between checkpoints.
        num_threads: CPU threads of torch; None leaves torch's own choice.
        non_finite: What to do when a loss or the gradient is not finite: end the run, skip the optimizer step, or
            look away (``off``).
        peak_flops: Dense FLOP/s of one device in the run's precision, for ``mfu`` and ``hfu``; None knows common
            GPUs, and logs neither on others.
        **settings: See ``lightning.pytorch.Trainer``.

    Raises:
        ValueError: A number is out of range, or ``non_finite`` none of the three.
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
        asked = {**settings, "num_threads": num_threads, "peak_flops": peak_flops}
        check_numbers(asked)
        check_machine(asked)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        run = Path(settings.get("default_root_dir") or DEFAULT_RUN)
        settings["default_root_dir"] = str(run)
        standing = [*_observers(peak_flops), *_guards(non_finite), *_keepers(run, checkpoint_every, settings)]
        settings["callbacks"] = [*_as_list(settings.get("callbacks")), *standing]
        settings["logger"] = _loggers(run, settings.get("logger"))
        if settings.get("enable_model_summary") is None:
            settings["enable_model_summary"] = False
        super().__init__(**settings)


def check_numbers(settings: dict[str, Any]) -> None:
    """Refuse numbers of a trainer that Lightning takes and that would crash, hang or train nothing.

    Args:
        settings: The trainer's, by name; absent ones and None pass.

    Raises:
        ValueError: One is out of range.
    """
    given = {name: value for name, value in settings.items() if isinstance(value, int | float)}
    for name, value in given.items():
        require_finite(f"trainer.{name}", value)
        if name in _LEAST:
            require_at_least(_LEAST[name], f"trainer.{name}", value)
    for name in ("limit_train_batches", "max_epochs"):
        if given.get(name) == 0 and given[name] is not False:
            raise ValueError(f"trainer.{name} is 0, which trains nothing; leave it out")
    if given.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval is 0; to leave validation out set trainer.limit_val_batches to 0")
    if given.get("peak_flops", 1) <= 0:
        raise ValueError(f"trainer.peak_flops must be above 0, not {given['peak_flops']}")
    if given.get("min_steps", 0) > given.get("max_steps", -1) >= 0:
        raise ValueError(f"trainer.min_steps is {given['min_steps']}, above trainer.max_steps, {given['max_steps']}")


def check_machine(settings: dict[str, Any]) -> None:
    """Refuse what this machine could not do, or what would wait for others that never come.

    Args:
        settings: As for ``check_numbers``.

    Raises:
        ValueError: It asks for too much.
    """
    nodes = settings.get("num_nodes") or 1
    if nodes > 1 and not _LAUNCHERS & os.environ.keys():
        raise ValueError(
            f"trainer.num_nodes is {nodes} and nothing says where the nodes are; start it with torchrun or "
            "SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )
    _check_workers("num_threads", settings.get("num_threads"))
    if settings.get("accelerator") == "cpu" or not torch.accelerator.is_available():
        _check_workers("devices", settings.get("devices"))
        _check_cpu_strategy(settings.get("strategy"))


def _check_workers(name: str, asked: Any) -> None:
    """Threads or processes of the CPU; far more of them than cores bring a machine down."""
    most = max(_MANY, 4 * (os.cpu_count() or 1))
    if str(asked).isdecimal() and int(asked) > most:
        raise ValueError(f"trainer.{name} is {asked}; with {os.cpu_count()} cores take {most} at most")


def _check_cpu_strategy(strategy: Any) -> None:
    """Lightning finds these out after the corpus is read and the model is built."""
    if isinstance(strategy, str) and "." in strategy:
        raise ValueError(
            f"trainer.strategy: {strategy} is no class that can be built; give class_path and all init_args it needs"
        )
    if isinstance(strategy, str) and strategy.startswith("deepspeed"):
        raise ValueError(f"trainer.strategy {strategy} needs CUDA; on the CPU take one of {', '.join(WORDS)}")


def _observers(peak_flops: float | None) -> list[pl.Callback]:
    return [StepSeeding(), Throughput(peak_flops), PeakMemory(), ThreadCount(), RunSummary()]


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
