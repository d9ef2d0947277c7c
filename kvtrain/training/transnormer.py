"""Training a TransNormer from nothing: next tokens, masked tokens, or classes."""

import copy
from collections.abc import Collection
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvtrain.cache.base import KVCache
from kvtrain.cache.rows import Placement
from kvtrain.data.packing import Batch
from kvtrain.errors import unknown
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.models.cache_size import KV_DTYPE
from kvtrain.models.method import Repeat
from kvtrain.models.transnormer.cache import cache_layers
from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.heads import (
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
)
from kvtrain.training.base import Cost, TrainingModule

# What every Hugging Face configuration has and a recipe may want.
_COMMON = {"id2label", "label2id", "num_labels"}


class TransNormerModule(TrainingModule):
    """Trains a causal language model.

    Args:
        config: Settings of the model, by the names of ``kvtrain.TransNormerConfig``.
        preset: Published settings that ``config`` changes: ``"lm"``, ``"roberta"`` or ``"lra"``.
        **training: See ``TrainingModule``.

    Raises:
        ValueError: The configuration has no such setting, or a value is out of range.
    """

    head: ClassVar[type[PreTrainedModel]] = TransNormerForCausalLM

    def __init__(self, config: dict[str, Any], preset: str | None = None, **training: Any) -> None:
        super().__init__(**training)
        known = {field.name for field in fields(TransNormerConfig)} | _COMMON
        if strange := sorted(set(config) - known):
            own = {field.name for field in fields(TransNormerConfig)} - {f.name for f in fields(PreTrainedConfig)}
            raise ValueError(unknown("setting of a TransNormer", strange[0], own))
        self.config = TransNormerConfig.preset(preset, **config) if preset else TransNormerConfig(**config)
        self.config.architectures = [self.head.__name__]

    def build_model(self) -> PreTrainedModel:
        """A model with random weights that depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.head(self.config)

    def vocab_size(self) -> int | None:
        """See ``TrainingModule``."""
        return int(self.config.vocab_size)

    def build_meta_model(self) -> nn.Module:
        """See ``TrainingModule``."""
        with torch.device("meta"):
            return self.head(self.config)

    def repeats(self) -> list[Repeat]:
        """See ``TrainingModule``; a layer of each kind together, since the first half of all layers is of one kind."""
        depth, blocks = self.config.num_hidden_layers, self.config.num_block_layers
        return [[(layer, depth - blocks + layer) for layer in range(blocks)]]

    def simplify(self, dropped: Collection[int]) -> None:
        """See ``TrainingModule``."""
        self.config = copy.deepcopy(self.config)
        self.config.num_hidden_layers -= len(dropped)

    def cost(self, sequence_length: int) -> Cost:
        """See ``TrainingModule``; the cache before is that of softmax attention of the same width and depth."""
        config = self.config
        before = 2 * config.num_hidden_layers * config.hidden_size * KV_DTYPE.itemsize * sequence_length
        return Cost(config.variant, 1.0, before, self._cache_bytes(sequence_length))

    def _cache_bytes(self, sequence_length: int) -> int:
        layers = cache_layers(self.config, [Placement(KV_DTYPE)] * self.config.num_hidden_layers)
        return KVCache(layers).bytes_for(sequence_length, rows=1)


class _CachelessModule(TransNormerModule):
    """Trains a model that reads whole rows and keeps nothing."""

    def cost(self, sequence_length: int) -> Cost:
        """See ``TrainingModule``: there is no cache."""
        return Cost(self.config.variant, 1.0, 0, 0)

    def num_targets(self, batch: Batch) -> Tensor:
        """See ``TrainingModule``; labels stand at their own places."""
        return (batch["labels"] != IGNORE_INDEX).sum()


class TransNormerMaskedModule(_CachelessModule):
    """Trains a masked language model, on ``kvtrain.data.masking.MaskedDataModule``; see ``TransNormerModule``."""

    head = TransNormerForMaskedLM


class TransNormerClassificationModule(_CachelessModule):
    """Trains a classifier of rows; see ``TransNormerModule``. Logs ``val_accuracy``."""

    head = TransNormerForSequenceClassification

    def model_arguments(self, batch: Batch) -> dict[str, Any]:
        """See ``TrainingModule``."""
        return {"attention_mask": batch["document_ids"]}

    def estimate_batch(self, batch: Batch) -> Batch:
        """See ``TrainingModule``."""
        return {**batch, "labels": batch["labels"][:, 0], "document_ids": torch.ones_like(batch["document_ids"])}

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        super().on_validation_epoch_start()
        self._right = torch.zeros((), dtype=torch.float64, device=self.device)

    def observe_validation(self, batch: Batch, arguments: dict[str, Any], output: Any) -> None:
        """Count the rows whose class is found."""
        self._right += (output.logits.argmax(-1) == batch["labels"]).sum()

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy over all ranks."""
        super().on_validation_epoch_end()
        sums = torch.stack([self._right, self._validation_targets])
        right, rows = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.log("val_accuracy", (right / rows).float(), prog_bar=True)
