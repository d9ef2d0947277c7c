"""Where metrics go beside ``metrics.csv``, and where a profile goes: what a recipe asks for in a word."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only

from kvtrain import durable
from kvtrain.errors import UsageError, unknown
from kvtrain.training.csv_logger import CSVMetrics

LoggerName = Literal["wandb", "tensorboard"]
AskedLogger = Logger | LoggerName
WANDB_ID = "wandb_id"
_PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


class RunWandb(WandbLogger):
    """Weights & Biases, below the run folder; a run that goes on keeps its id, which lies there in ``wandb_id``.

    The project is ``kvtrain`` unless ``WANDB_PROJECT`` says otherwise, the name that of the run folder.

    Args:
        run: Run folder.
    """

    def __init__(self, run: Path) -> None:
        self._id_file = run / WANDB_ID
        known = self._id_file.read_text(encoding="utf-8").strip() if self._id_file.is_file() else ""
        self._noted = bool(known)
        project = os.environ.get("WANDB_PROJECT", "kvtrain")
        super().__init__(name=run.name, save_dir=str(run), id=known or None, project=project, resume="allow")

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log, and note the id when there is something to go on with."""
        super().log_metrics(metrics, step)
        if not self._noted:
            durable.write_text(self._id_file, f"{self.experiment.id}\n")
            self._noted = True


def _tensorboard(run: Path) -> Logger:
    return TensorBoardLogger(str(run), name="tensorboard", version="", default_hp_metric=False)


_LOGGERS: dict[str, Callable[[Path], Logger]] = {"wandb": RunWandb, "tensorboard": _tensorboard}


def run_loggers(run: Path, asked: Any) -> list[Logger] | bool:
    """``metrics.csv`` always, beside what the recipe asks for; ``False`` turns everything off.

    Args:
        run: Run folder.
        asked: A word, a logger, several of them, None, or a switch.

    Raises:
        UsageError: A logger's package is not installed.
    """
    if asked is False:
        return False
    others = [] if asked in (None, True) else asked if isinstance(asked, list | tuple) else [asked]
    return [CSVMetrics(str(run)), *(_built(run, other) for other in others)]


def _built(run: Path, asked: AskedLogger) -> Logger:
    if isinstance(asked, Logger):
        return asked
    if importlib.util.find_spec(asked) is None:
        raise UsageError(f"trainer.logger: {asked} is not installed: pip install 'kvtrain[{asked}]'")
    return _LOGGERS[asked](run)


def run_profiler(run: Path, asked: Profiler | str | None) -> Profiler | None:
    """A profiler whose files go to ``profile/`` in the run folder, where a word asks for it.

    Raises:
        UsageError: There is none of that name.
    """
    if asked is None or isinstance(asked, Profiler):
        return asked
    if asked not in _PROFILERS:
        raise UsageError(unknown("trainer.profiler", asked, _PROFILERS, f"There are {', '.join(_PROFILERS)}"))
    return _PROFILERS[asked](dirpath=str(run / "profile"), filename=asked)
