"""A run's adapter beside the model that it stands on, in PEFT's own form, for whoever does not want it merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from kvtrain.errors import UsageError
from kvtrain.models.adapters import LORA_KEY, LoRA, peft_tensors, without_matrices
from kvtrain.models.checkpoint import StoredModel
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.gating import borrowed_rows
from kvtrain.models.host import retrofitted_class

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter that is written by itself.

    Attributes:
        settings: How it was made.
        tensors: Its matrices by PEFT's names.
        base: Where the model will be found that it stands on.
    """

    settings: LoRA
    tensors: Mapping[str, Tensor]
    base: str

    def write(self, folder: Path) -> None:
        """Write what ``peft.PeftModel.from_pretrained`` opens into a new folder."""
        folder.mkdir()
        self.settings.peft_config(task_type="CAUSAL_LM", base_model_name_or_path=self.base).save_pretrained(folder)
        save_file(dict(self.tensors), folder / "adapter_model.safetensors", {"format": "pt"})


def take_adapter(stored: StoredModel, run: Path, base: str) -> tuple[StoredModel, KeptAdapter]:
    """Part a checkpoint's adapter from all else that was learnt.

    Args:
        stored: The checkpoint.
        run: Where it comes from.
        base: Where the model will be found that the adapter stands on.

    Raises:
        UsageError: It has none.
    """
    lora = stored.settings.get(LORA_KEY)
    if not lora:
        raise UsageError(f"{run}: the run has no lora, and so no adapter to keep; export without --keep-adapter")
    settings = dict(stored.settings["config"])
    config: Any = AutoConfig.for_model(settings.pop("model_type"), **settings)
    borrowed = borrowed_of(config)
    kept = KeptAdapter(LoRA(**lora), peft_tensors(stored.weights, borrowed), base)
    return StoredModel(stored.settings, without_matrices(stored.weights)), kept


def borrowed_of(config: KVTrainConfig) -> dict[str, slice]:
    """Modules by name, and rows of their weights that make borrowed channels."""
    with torch.device("meta"):
        return borrowed_rows(retrofitted_class(config.host_config)(config))
