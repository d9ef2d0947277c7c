"""Lightning's trainer with the parts that every run of kvtrain has."""

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from kvtrain.errors import UsageError, require_at_least
from kvtrain.launcher import Launch, adopt_node_rank
from kvtrain.run_lock import run_lock
from kvtrain.training.callbacks import StepSeeding, Throughput, TokenProgress
from kvtrain.training.callbacks.checkpoints import RunCheckpoint
from kvtrain.training.callbacks.gradients import GradientNorm
from kvtrain.training.callbacks.guard import MAX_SKIPS, NonFiniteGuard
from kvtrain.training.callbacks.preemption import Preemption
from kvtrain.training.callbacks.run_summary import RunSummary
from kvtrain.training.callbacks.threads import ThreadCount
from kvtrain.training.checkpoint_io import StreamedCheckpointIO
from kvtrain.training.loggers import AskedLogger, run_loggers, run_profiler
from kvtrain.training.ranks import set_timeout
from kvtrain.training.strategies import WORDS
from kvtrain.training.strategies.base import StrategyTraits

DEFAULT_RUN = "runs/unnamed"
_MANY = 64
# Of what tells a process of its peers on other nodes; without one it would wait for them for half an hour.
_LAUNCHERS = {"MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_consecutive_skips": 1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "num_threads": 1,
}
# By name: those that people ask for, and more of Lightning's.
_ASKED_STRATEGIES = ("auto", "ddp", *WORDS)
_STRATEGIES = (*_ASKED_STRATEGIES, "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
# A bare `off` in a recipe is false: YAML says so.
NonFinitePolicy = Literal["off", "skip", "stop"] | Literal[False]


class KVTrainer(pl.Trainer):
    """Lightning's trainer with kvtrain's standing parts: metrics, progress, seeding, checkpoints.

    A run folder is ``default_root_dir``; it holds ``config.yaml``, ``metrics.csv`` and ``checkpoints/``. While ``fit``
    runs no other process may write there.

    Args:
        checkpoint_every: Optimizer steps between checkpoints.
        num_threads: CPU threads of torch; None leaves torch's own choice.
        non_finite: What to do when a loss or the gradient is not finite: end the run, skip the optimizer step, or
            look away (``off``).
        max_consecutive_skips: Optimizer steps skipped in a row after which the run ends nevertheless.
        peak_flops: Dense FLOP/s of one device in the run's precision, for ``mfu`` and ``hfu``; None knows common
            GPUs, and logs neither on others.
        timeout_minutes: How long a rank waits for the others before the run ends; None leaves the strategy's own
            choice, 30 minutes with most.
        logger: ``wandb`` or ``tensorboard``, a logger of Lightning's, or several of them, beside ``metrics.csv``;
            False turns that off, too.
        profiler: Where time goes: ``simple``, ``advanced`` or ``pytorch``, into ``profile/`` in the run folder, or a
            profiler of Lightning's.
        **settings: See ``lightning.pytorch.Trainer``.

    Raises:
        ValueError: A number is out of range, ``non_finite`` none of the three, a logger not installed, or a launcher
            has started another number of processes than devices and nodes come to.
    """

    def __init__(
        self,
        *,
        checkpoint_every: int = 100,
        num_threads: int | None = None,
        non_finite: NonFinitePolicy = "stop",
        max_consecutive_skips: int = MAX_SKIPS,
        peak_flops: float | None = None,
        timeout_minutes: float | None = None,
        logger: AskedLogger | list[AskedLogger] | bool | None = None,
        profiler: Profiler | str | None = None,
        **settings: Any,
    ) -> None:
        ours = {"num_threads": num_threads, "peak_flops": peak_flops, "timeout_minutes": timeout_minutes}
        asked = {**settings, **ours, "max_consecutive_skips": max_consecutive_skips}
        check_numbers(asked)
        check_machine(asked)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        run = Path(settings.get("default_root_dir") or DEFAULT_RUN)
        settings["default_root_dir"] = str(run)
        guards = _guards(non_finite, max_consecutive_skips)
        standing = [*_observers(peak_flops), *guards, *_keepers(run, checkpoint_every, settings)]
        settings["callbacks"] = [*_as_list(settings.get("callbacks")), *standing]
        settings["logger"] = run_loggers(run, logger)
        settings["profiler"] = run_profiler(run, profiler)
        settings["plugins"] = _plugins(settings.get("plugins"), settings.get("strategy"))
        if settings.get("enable_model_summary") is None:
            settings["enable_model_summary"] = False
        adopt_node_rank()
        super().__init__(**settings)
        if launch := Launch.detect():
            launch.check(self.num_devices, self.num_nodes, self.global_rank)
        if timeout_minutes is not None:
            set_timeout(self, timeout_minutes)
        if isinstance(profiler, str) and self.num_nodes > 1:  # ranks of a node are told apart by Lightning
            self.profiler.filename = f"{profiler}-node{self.node_rank}"  # type: ignore[attr-defined]

    def _run(self, *args: Any, **settings: Any) -> Any:
        """As Lightning's; a run that writes into its folder holds it."""
        writes = bool(self.checkpoint_callbacks or self.loggers) and self.state.fn == TrainerFn.FITTING
        with run_lock(Path(self.default_root_dir)) if writes and self.is_global_zero else nullcontext():
            return super()._run(*args, **settings)

    def _run_stage(self) -> Any:
        """As Lightning's, which passes over a run that has taken all its steps, whatever it still owes."""
        loop = self.fit_loop
        if self.state.fn == TrainerFn.FITTING and loop.restarting and loop.done:
            loop.setup_data()
            loop.on_run_start()
            loop.on_run_end()
            self.num_sanity_val_steps = 0  # nothing is trained after it
        return super()._run_stage()


def check_numbers(settings: dict[str, Any]) -> None:
    """Refuse numbers of a trainer that Lightning takes and that would crash, hang or train nothing.

    Args:
        settings: The trainer's, by name; absent ones and None pass.

    Raises:
        ValueError: One is out of range.
    """
    given = {name: value for name, value in settings.items() if isinstance(value, int | float)}
    for name, value in given.items():
        if not math.isfinite(value):
            raise UsageError(f"trainer.{name} must be a finite number, not {value}")
        if name in _LEAST:
            require_at_least(_LEAST[name], f"trainer.{name}", value)
    for name in ("limit_train_batches", "max_epochs"):
        if given.get(name) == 0 and given[name] is not False:
            raise ValueError(f"trainer.{name} is 0, which trains nothing; leave it out")
    if given.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval is 0; to leave validation out set trainer.limit_val_batches to 0")
    for name in ("peak_flops", "timeout_minutes"):
        if given.get(name, 1) <= 0:
            raise ValueError(f"trainer.{name} must be above 0, not {given[name]}")
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
    check_strategy(settings.get("strategy"))


def _check_workers(name: str, asked: Any) -> None:
    """Threads or processes of the CPU; far more of them than cores bring a machine down."""
    most = max(_MANY, 4 * (os.cpu_count() or 1))
    if str(asked).isdecimal() and int(asked) > most:
        raise ValueError(f"trainer.{name} is {asked}; with {os.cpu_count()} cores take {most} at most")


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy under which nothing here has been made to shard, to save or to sum as it should.

    Args:
        strategy: The trainer's; None passes.

    Raises:
        ValueError: It is neither one device, nor DDP, nor one of kvtrain's own or made of one.
    """
    if strategy is None or (isinstance(strategy, str) and strategy.lower() in _STRATEGIES):
        return
    plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if plain or isinstance(strategy, StrategyTraits):
        return
    name = repr(strategy) if isinstance(strategy, str) else type(strategy).__name__
    raise ValueError(
        f"trainer.strategy {name} is none that kvtrain trains under; there are {', '.join(_ASKED_STRATEGIES)}, and as "
        "class_path with init_args kvtrain.training.strategies.DeepSpeedZeRO and FSDP2"
    )


def _observers(peak_flops: float | None) -> list[pl.Callback]:
    return [StepSeeding(), Throughput(peak_flops), ThreadCount(), RunSummary()]


def _guards(non_finite: NonFinitePolicy, max_consecutive_skips: int) -> list[pl.Callback]:
    gradients = GradientNorm()
    if non_finite is False or non_finite == "off":
        return [gradients]
    return [gradients, NonFiniteGuard(non_finite, gradients, max_consecutive_skips)]


def _keepers(run: Path, checkpoint_every: int, settings: dict[str, Any]) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = [Preemption()]
    if settings.get("enable_progress_bar") is not False:
        callbacks.append(TokenProgress())
    if settings.get("enable_checkpointing") is not False:
        callbacks.append(RunCheckpoint(run, checkpoint_every))
    return callbacks


def _plugins(asked: Any, strategy: Any) -> list[Any]:
    """Our way of writing checkpoints, unless the recipe brings another."""
    plugins = _as_list(asked)
    brought = getattr(strategy, "_checkpoint_io", None) or any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if brought else [*plugins, StreamedCheckpointIO()]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
