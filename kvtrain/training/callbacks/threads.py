"""The number of CPU threads belongs to a run: another count adds in another order and changes the last bits."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch

logger = logging.getLogger("kvtrain")


class ThreadCount(pl.Callback):
    """Records torch's thread count in every checkpoint and warns when a run goes on with another one."""

    def __init__(self) -> None:
        self._recorded: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The count of this process."""
        return {"num_threads": torch.get_num_threads()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint says."""
        self._recorded = state_dict["num_threads"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare; only sums on the CPU depend on it."""
        current = torch.get_num_threads()
        if self._recorded not in (None, current) and trainer.strategy.root_device.type == "cpu":
            logger.warning(
                "the run was trained on %d CPU threads and goes on with %d: not bit for bit the same; "
                "set --trainer.num_threads %d",
                self._recorded,
                current,
                self._recorded,
            )
