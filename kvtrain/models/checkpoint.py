"""Training checkpoints, files and folders: opened without running any code that they might hold."""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtrain.errors import first_line
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.models.sharded import WEIGHTS, ShardedReader, is_sharded
from kvtrain.models.weights import StoredWeights
from kvtrain.models.zero import ZeROCheckpoint, is_zero

_SETTINGS = {"config", "tokenizer"}
_MODEL = "model."  # how names of the model's own weights begin in a training module


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint holds of the model that was trained.

    Attributes:
        settings: Its configuration, tokenizer, and what else the training module wrote for exports.
        weights: By their names in the model; those that a run left alone may be absent.
    """

    settings: dict[str, Any]
    weights: Mapping[str, Tensor]


def open_checkpoint(path: Path) -> StoredModel:
    """Open a checkpoint of ``kvtrain fit``, of any strategy; weights are read one at a time, when they are asked for.

    Raises:
        ValueError: It is damaged, or not one of ours.
    """
    if is_sharded(path):
        reader = ShardedReader(path)
        return StoredModel(_settings(path, reader.rest()), _named(reader.tensors(), reader.read, WEIGHTS + _MODEL))
    if is_zero(path):
        zero = ZeROCheckpoint(path)
        settings = _settings(path, zero.model_states[0])
        names = zero.trained if settings.get("base") else zero.names()
        return StoredModel(settings, _named(names, zero.read, _MODEL))
    if path.is_dir():
        raise ValueError(f"{path}: not a checkpoint of `kvtrain fit`")
    checkpoint = read_checkpoint(path)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return StoredModel(_settings(path, checkpoint), _named(state, state.__getitem__, _MODEL))


def _named(names: Iterable[str], read: Callable[[str], Tensor], prefix: str) -> StoredWeights:
    return StoredWeights({name.removeprefix(prefix): name for name in names if name.startswith(prefix)}, read)


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
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of `kvtrain fit`")
    _settings(path, checkpoint)
    return checkpoint


def _settings(path: Path, checkpoint: Any) -> dict[str, Any]:
    """What a training module wrote for exports.

    Raises:
        ValueError: It is missing or not whole.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of `kvtrain fit`")
    try:
        settings: dict[str, Any] = json.loads(checkpoint[CHECKPOINT_KEY])
        complete = settings.keys() >= _SETTINGS
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, its configuration cannot be read ({first_line(error)})") from error
    if not complete:
        raise ValueError(f"{path}: damaged, its configuration is not whole")
    return settings
