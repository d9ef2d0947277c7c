"""Making up for a validation: what Lightning's loops would have done next when the process was killed."""

from typing import Any

import lightning.pytorch as pl


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Whether a run that is about to go on was saved at a step that is followed by a validation.

    To be asked before the first batch, while the loops stand where the checkpoint was written. Lightning passes over
    what is due there: it takes a checkpoint for one of after the validation.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    return bool(loop.restarting and loop._should_check_val_fx(fetcher))


def run_validation(trainer: pl.Trainer) -> None:
    """Validate between two batches, as the training loop does; every rank calls it."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True
