"""A recipe's first micro-batch, looked at and trained on: what no estimate says."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from kvtrain.data.packing import IGNORE_INDEX, Batch
from kvtrain.data.picture import Piece, pieces
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import first_line, in_one_line, is_mistake
from kvtrain.training.cli import ReadRecipe, require_vocabulary
from kvtrain.training.estimate import readable
from kvtrain.training.preflight.verdicts import Finding
from kvtrain.training.refusals import refusals
from kvtrain.training.trainer import KVTrainer

# Of the recipe's trainer, what a micro-batch depends on.
_SETTINGS = ("accelerator", "precision", "strategy", "num_threads", "gradient_clip_val")
_MANY_PROCESSES = "not tried: several processes train, and this is one"


class Trial(NamedTuple):
    """What came of it.

    Attributes:
        findings: Lines of the table.
        text: Of the batch's first row, with what is learned; empty where rows are no text.
    """

    findings: list[Finding]
    text: list[Piece]


def try_batch(recipe: ReadRecipe) -> Trial:
    """Read a recipe's data, build its model, and train one micro-batch; kept is tokenised text in the cache alone.

    Args:
        recipe: For one process.
    """
    module, data = recipe.module, recipe.data
    asked = {name: recipe.trainer[name] for name in _SETTINGS if recipe.trainer.get(name) is not None}
    watch, began = _FirstBatch(), time.perf_counter()
    try:
        with TemporaryDirectory(prefix="kvtrain-check-") as folder, refusals(), _silence():
            module.check_steps(recipe.trainer["max_steps"])
            module.check_model()
            require_vocabulary(data, module)
            _trainer(Path(folder), watch, asked).fit(module, data)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        if not (is_mistake(error) or isinstance(error, torch.OutOfMemoryError)):
            raise
        return Trial([*watch.findings(data), _failure(error, watch)], watch.text(data))
    seconds = time.perf_counter() - began
    loss = watch.trainer_loss
    found = f"loss {loss:.4g} forward and backward in {watch.seconds:.1f} s; {seconds:.0f} s with all that comes before"
    remedy = "" if torch.isfinite(torch.tensor(loss)) else "no number: look at learning rates, precision and data"
    return Trial([*watch.findings(data), Finding("micro-batch", found, remedy)], watch.text(data))


@contextmanager
def _silence() -> Iterator[None]:
    """No word about a run of one step in a folder that nobody will find."""
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, ("kvtrain", "lightning.pytorch"))]
    for logger, _ in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)


def not_tried(recipe: ReadRecipe, processes: int) -> Finding | None:
    """Why a micro-batch cannot be tried here; None where it can."""
    accelerator = recipe.trainer.get("accelerator") or "auto"
    if processes > 1:
        return Finding("micro-batch", _MANY_PROCESSES)
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        return Finding("micro-batch", f"not tried: the recipe trains on {accelerator}, and none is here")
    return None


class _FirstBatch(pl.Callback):
    """Keeps the first batch, and the time that it takes."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.seconds, self.trainer_loss, self._began = 0.0, float("nan"), 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch is on its device."""
        self.batch = {name: value.detach().cpu() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is taken."""
        self.trainer_loss = float(trainer.callback_metrics["loss"])
        self.seconds = time.perf_counter() - self._began

    def findings(self, data: Any) -> list[Finding]:
        """What the batch holds."""
        if self.batch is None:
            return []
        rows, tokens = self.batch["input_ids"].shape
        learned = (self.batch["labels"][:, 1:] != IGNORE_INDEX).sum().item() if "labels" in self.batch else 0
        real = (self.batch["document_ids"] > 0).sum().item() if "document_ids" in self.batch else rows * tokens
        found = f"{rows} x {tokens:,} tokens, {real / (rows * tokens):.0%} of them no padding, {learned:,} learned"
        return [Finding("first batch", found, "" if learned else "nothing is learned: look at the labels of the data")]

    def text(self, data: Any) -> list[Piece]:
        """The first document of the first row."""
        if self.batch is None or not getattr(data, "tokenizer_name", None) or "document_ids" not in self.batch:
            return []
        documents = self.batch["document_ids"][0].tolist()
        length = len(list(takewhile(lambda number: number == documents[0], documents)))
        ids, labels = (self.batch[name][0, :length].tolist() for name in ("input_ids", "labels"))
        learned = [place > 0 and label != IGNORE_INDEX for place, label in enumerate(labels)]
        return list(pieces(ids, learned, load_tokenizer(data.tokenizer_name)))


def _trainer(folder: Path, watch: pl.Callback, asked: dict[str, Any]) -> KVTrainer:
    return KVTrainer(
        default_root_dir=str(folder),
        max_steps=1,
        devices=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[watch],
        **asked,
    )


def _failure(error: Exception, watch: _FirstBatch) -> Finding:
    """What went wrong, and what may help."""
    if not isinstance(error, torch.OutOfMemoryError):
        return Finding("micro-batch" if watch.batch else "recipe", "failed", in_one_line(error))
    free, total = torch.cuda.mem_get_info()
    remedy = "lower data.batch_size or sequence_length, or set activation_checkpointing: true, or lora and weights"
    return Finding("micro-batch", f"out of memory ({readable(total - free)} taken): {first_line(error)}", remedy)
