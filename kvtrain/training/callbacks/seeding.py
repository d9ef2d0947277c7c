"""Global random state derived from the step, never stored: resuming finds the same numbers."""

from typing import Any

import lightning.pytorch as pl

from kvtrain.training.base import TrainingModule


class StepSeeding(pl.Callback):
    """Seeds python, numpy and torch at every micro-batch from (seed, step, micro-batch, rank).

    Lightning saves no random state, and building a loader draws from it, so that whatever used the
    global generators would differ after a resume.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed."""
        assert isinstance(pl_module, TrainingModule)
        words = (pl_module.seed, trainer.global_step, batch_idx, trainer.global_rank)
        seed = 0
        for word in words:
            seed = (seed * 1_000_003 + word + 1) % (1 << 32)
        pl.seed_everything(seed, verbose=False)
