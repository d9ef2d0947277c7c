"""Weights and configuration of a model as a Hugging Face folder, one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from kvtrain.models.hosts import host_adapters
from kvtrain.models.hosts.base import HostAdapter

MAX_SHARD_SIZE = "5GB"


def write_model(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write what ``save_pretrained`` writes; in memory are one file's weights at a time.

    Args:
        model: On any device; its own weights are not looked at.
        weights: By name; read when they are asked for.
        folder: An existing one.
        dtype: Of the files, but for weights that the model says must stay in float32.

    Raises:
        ValueError: A weight is missing, has another shape, or is none of the model's.
    """
    stored = _stored(model, dtype)
    _check(model, stored, weights)
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    pattern = SAFE_WEIGHTS_NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=MAX_SHARD_SIZE)
    adapter, places = host_adapters().get(model.config.model_type, HostAdapter()), dict[str, str]()
    for file, names in split.filename_to_tensors.items():
        read = ((name, _read(name, weights, stored[name])) for name in names)
        places |= dict.fromkeys(_write_file(read, adapter, folder / file), file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": places}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _stored(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Shapes and types of what is written, by name, ties once; all on the meta device."""
    kept, persistent = tuple(model._keep_in_fp32_modules_strict or ()), model.state_dict()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stored = {}
    for name, tensor in tensors.items():
        if name in persistent:
            wide = torch.float32 if any(part in kept for part in name.split(".")) else dtype
            chosen = wide if tensor.is_floating_point() else tensor.dtype
            stored[name] = torch.empty(tensor.shape, dtype=chosen, device="meta")
    return stored


def _write_file(weights: Iterable[tuple[str, Tensor]], adapter: HostAdapter, path: Path) -> list[str]:
    """Write weights as a family's files have them, and give their names; none is held when the next file is read."""
    content = {own: part for name, weight in weights for own, part in adapter.file_weights(name, weight).items()}
    save_file(content, path, {"format": "pt"})
    return list(content)


def _read(name: str, weights: Mapping[str, Tensor], like: Tensor) -> Tensor:
    weight = weights[name]
    if weight.shape != like.shape:
        raise ValueError(f"the checkpoint does not fit its own configuration: {name} is {tuple(weight.shape)} in it")
    return weight.detach().to(like.dtype).contiguous()


def _check(model: PreTrainedModel, stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    lost, foreign = [name for name in stored if name not in weights], set(weights) - set(model.state_dict())
    if lost or foreign:
        raise ValueError(f"the checkpoint does not fit its own configuration, first in {min([*lost, *foreign])}")
