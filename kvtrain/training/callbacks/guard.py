"""Numbers that are not finite never reach the weights."""

import logging
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.run_folder import last_checkpoint
from kvtrain.training.callbacks.gradients import GradientNorm
from kvtrain.training.strategies.base import traits

MAX_SKIPS = 20
_ROWS_SHOWN = 16
logger = logging.getLogger("kvtrain")


class NonFiniteError(ValueError):
    """A loss or the gradient was not finite; the message says at which step and in which rows."""


class NonFiniteGuard(pl.Callback):
    """Drops an optimizer step, or ends the run, where a loss or the gradient is not finite, on all ranks alike.

    Losses are taken before the backward pass and the gradient's norm after it; both are looked at once an
    optimizer step, because reading every loss would stall a GPU. A dropped step leaves weights and moments as they
    are and counts as taken. Where losses are scaled (``16-mixed``) a gradient that overflows is part of the
    procedure, which drops the step by itself: then losses alone are looked at.

    A strategy that keeps gradients to itself (DeepSpeed) drops the step by its own check, which is turned on, and
    losses that are not finite make their gradients such.

    Args:
        policy: What to do.
        gradients: Tells the norm; stands before this callback in the trainer's list.
        max_consecutive_skips: Dropped steps in a row after which a run ends that skips: it learns nothing any more.

    Raises:
        ValueError: Another policy.
    """

    def __init__(
        self, policy: Literal["skip", "stop"], gradients: GradientNorm, max_consecutive_skips: int = MAX_SKIPS
    ) -> None:
        if policy not in ("skip", "stop"):
            raise ValueError(f"trainer.non_finite must be off, skip or stop, not {policy!r}")
        self.policy, self.gradients, self.max_consecutive_skips = policy, gradients, max_consecutive_skips
        self.skipped_steps = self.consecutive_skips = 0
        self._losses: list[Tensor] = []  # of the optimizer window's batches
        self._rows: list[Tensor] = []  # (B,) each

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped_steps": self.skipped_steps, "consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped_steps = state_dict["skipped_steps"]
        self.consecutive_skips = state_dict.get("consecutive_skips", 0)  # version 0.1 has none

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn the strategy's own check on, where it has one."""
        traits(trainer).watch_overflow()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember whose batch it is."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses, self._rows = [], []
        self._rows.append(batch["row_ids"])

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss, and let its gradients tell of it."""
        value = loss.detach()
        self._losses.append(value)
        loss.register_hook(lambda gradient: gradient + 0 * value)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the window's losses and gradient; a step without gradients changes nothing."""
        if traits(trainer).drops_steps:
            return
        norm = [] if _scales_losses(trainer) or self.gradients.norm is None else [self.gradients.norm]
        if self._is_bad(trainer, [*self._losses, *norm]):
            optimizer.zero_grad(set_to_none=True)
            self._drop(trainer, trainer.global_step + 1)
        else:
            self.consecutive_skips = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, hear what the strategy did by itself, and log."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if traits(trainer).drops_steps:
            if not traits(trainer).step_applied() and self._strategy_found(trainer):
                self._drop(trainer, trainer.global_step)
            else:
                self.consecutive_skips = 0
        if self.policy == "skip":
            pl_module.log("skipped_steps", float(self.skipped_steps))

    def _strategy_found(self, trainer: pl.Trainer) -> bool:
        """Whether a step that the strategy dropped was bad, and no overflow that scaling losses expects."""
        return not _scales_losses(trainer) or self._is_bad(trainer, self._losses)

    def _is_bad(self, trainer: pl.Trainer, values: list[Tensor]) -> bool:
        """Whether one of some numbers is not finite on any rank."""
        bad = ~torch.stack(values).isfinite().all()
        return trainer.strategy.reduce(bad.float(), reduce_op="max").item() > 0

    def _drop(self, trainer: pl.Trainer, step: int) -> None:
        """Count and say it, or end the run.

        Raises:
            NonFiniteError: The policy is ``stop``, or too many steps in a row were dropped.
        """
        what = f"step {step}: {self._blame(trainer)}; the weights are as they were before it"
        remedy = "or go on with --trainer.non_finite skip"
        if self.policy == "skip":
            self.skipped_steps += 1
            self.consecutive_skips += 1
            logger.warning("%s", what)
            if self.consecutive_skips < self.max_consecutive_skips:
                return
            what = f"{what}; {self.consecutive_skips} steps in a row were skipped (trainer.max_consecutive_skips)"
            remedy = "and look at the rows named above"
        last = last_checkpoint(Path(trainer.default_root_dir))
        good = f"the last good checkpoint is {last}" if last else "nothing is saved yet"
        raise NonFiniteError(f"{what}; {good}; lower the learning rate, {remedy}")

    def _blame(self, trainer: pl.Trainer) -> str:
        """Rows of the batches, over all ranks, whose loss is not finite; of the whole window where all are."""
        rows = trainer.strategy.all_gather(torch.stack(self._rows)).flatten(0, -2)  # (batches, B)
        finite = trainer.strategy.all_gather(torch.stack(self._losses).isfinite()).flatten()
        what = "gradient" if finite.all() else "loss"
        guilty = sorted((rows if finite.all() else rows[~finite]).flatten().tolist())
        more = f" and {len(guilty) - _ROWS_SHOWN} more" if len(guilty) > _ROWS_SHOWN else ""
        return f"the {what} is not finite, from rows {', '.join(map(str, guilty[:_ROWS_SHOWN]))}{more}"


def _scales_losses(trainer: pl.Trainer) -> bool:
    return trainer.precision in traits(trainer).scaled_precisions
