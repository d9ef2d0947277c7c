"""The progress bar: step, phase, loss, tokens/s, ETA, and the method's own figure."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal
_BAR_WIDTH = 16  # the rest of the line is for figures


class TokenProgress(ProgressBar):
    """One live line on a terminal; elsewhere a plain line every ten seconds.

    It shows whatever the modules log with ``prog_bar=True``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._printed = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Lightning turns it off on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Turn it on."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self._started = self._printed = time.monotonic()
        self._first_step = trainer.global_step
        if not self._enabled or not sys.stdout.isatty():
            return
        bar, facts = BarColumn(bar_width=_BAR_WIDTH), TextColumn("{task.description}")
        columns = (MofNCompleteColumn(), bar, TimeRemainingColumn(), facts)
        # Lines that go to the same terminal stand above the bar; those that go elsewhere stay where they go.
        self._bar = Progress(*columns, console=Console(), redirect_stderr=sys.stderr.isatty())
        self._bar.start()
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        if not self._enabled:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=self._facts(trainer, pl_module))
            return
        now = time.monotonic()
        if now - self._printed >= _PLAIN_INTERVAL or trainer.global_step == trainer.max_steps:
            self._printed = now
            print(self._line(trainer, pl_module, now), flush=True)

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, now: float) -> str:
        done = trainer.global_step - self._first_step
        remaining = (now - self._started) / max(1, done) * (trainer.max_steps - trainer.global_step)
        step = f"step {trainer.global_step}/{trainer.max_steps}"
        return f"{step}  {self._facts(trainer, pl_module)}  ETA {_clock(remaining)}"

    def _facts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        metrics = self.get_metrics(trainer, pl_module)
        return "  ".join(f"{_short(name)} {_number(value)}" for name, value in metrics.items() if name != "v_num")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the last line standing."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(name: str) -> str:
    return {"tokens_per_second": "tok/s", "val_perplexity": "held-out ppl"}.get(name, name.replace("_", " "))


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
