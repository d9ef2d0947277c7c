"""Training checkpoints as files: opened without running any code that they might hold."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from kvtrain.errors import first_line
from kvtrain.models.config import CHECKPOINT_KEY

_SETTINGS = {"config", "tokenizer"}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a Lightning checkpoint that ``kvtrain fit`` wrote; tensors stay on disk until they are looked at.

    Raises:
        ValueError: It is damaged, or not one of ours.
    """
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a readable checkpoint (damaged, or written by something else)")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle and zip readers raise a dozen unrelated types
        raise ValueError(f"{path}: not a readable checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of `kvtrain fit`")
    try:
        complete = json.loads(checkpoint[CHECKPOINT_KEY]).keys() >= _SETTINGS
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, its configuration cannot be read ({first_line(error)})") from error
    if not complete:
        raise ValueError(f"{path}: damaged, its configuration is not whole")
    return checkpoint
