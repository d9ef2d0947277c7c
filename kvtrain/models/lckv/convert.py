"""Weights and settings from elsewhere: a host's weights as this method wants them, and published checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvtrain.models.hosts import host_adapter
from kvtrain.models.hosts.base import HostAdapter
from kvtrain.models.lckv.attention import absent_parts, no_residual, residual_parts
from kvtrain.models.lckv.config import LCKV
from kvtrain.models.lckv.kv_map import KVMap

# What the authors' configurations say beyond a Llama's.
_PUBLISHED = {
    "architectures",
    "auto_map",
    "force_nodiag",
    "forward_passes",
    "backward_passes",
    "layer_types",
    "model_type",
    "num_encoders",
    "num_trained_encoders",
    "sliding_window",
    "target_layer",
    "train_encoder",
    "train_kv",
    "transformers_version",
    "use_sequential",
}


def published_settings(config: dict[str, Any]) -> LCKV:
    """The method of a checkpoint that the authors published.

    Args:
        config: Its ``config.json``. Two forms exist: ``layer_types`` is a map as here (2024-11 on), or it says of each
            layer whether it is ordinary (``0``), reads the target (``1``) or is the target (``2``).

    Raises:
        ValueError: There is no ``layer_types``, or several targets.
    """
    from kvtrain.models.lckv.config import LCKV

    types = config.get("layer_types")
    if not isinstance(types, str):
        raise ValueError("config.json has no layer_types string; only checkpoints of LCKV's authors are read here")
    if not {"num_encoders", "target_layer"} & set(config):
        return LCKV(
            kv_map=types,
            forward_passes=config.get("forward_passes", 7),
            backward_passes=config.get("backward_passes", 2),
            mask_all_diagonals=config.get("force_nodiag", False),
            sliding_window=config.get("sliding_window") or 4096,
        )
    kinds = types.split("_")
    targets = [layer for layer, kind in enumerate(kinds) if kind == "2"]
    if len(targets) != 1 or set(kinds) - {"0", "1", "2"}:
        raise ValueError(f"layer_types {types!r} must have one target, 2, beside layers of kind 0 and 1")
    trained = config.get("num_trained_encoders", 1)
    return LCKV(
        kv_map="_".join(str(targets[0] if kind == "1" else layer) for layer, kind in enumerate(kinds)),
        forward_passes=config.get("num_encoders", 8) - trained,
        backward_passes=trained + 1,
        mask_all_diagonals=True,
        stale_target=True,
    )


def load_published(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Open a checkpoint that the authors published as a kvtrain model; ``save_pretrained`` makes it one for good.

    Args:
        folder: Downloaded folder.
        **kwargs: Go to ``from_pretrained`` (``dtype``, ...).

    Raises:
        ValueError: It is no such checkpoint.
    """
    from transformers import LlamaConfig

    from kvtrain.models.config import KVTrainConfig
    from kvtrain.models.host import retrofitted_class

    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist; download the checkpoint's folder first")
    published = json.loads(path.read_text())
    method = published_settings(published)
    host_config = LlamaConfig(**{name: value for name, value in published.items() if name not in _PUBLISHED})
    config = KVTrainConfig(text_config=host_config, method_config=method.to_dict())
    model: PreTrainedModel = retrofitted_class(host_config).from_pretrained(folder, config=config, **kwargs)
    return model


def adapt_state(settings: LCKV, state: dict[str, Tensor], host_config: PreTrainedConfig) -> dict[str, Tensor]:
    """A host's state without the projections that nobody reads, and with what the method adds.

    Args:
        settings: The method; ``init="mean"`` gives every owner the mean of its readers' projections.
        state: The host's, by name.
        host_config: Its configuration.
    """
    adapted, depth, adapter = dict(state), host_config.num_hidden_layers, host_adapter(host_config)
    if settings.init == "mean":
        keys, values = settings.maps(depth)
        adapted |= _means(state, keys, "k_proj", adapter) | _means(state, values, "v_proj", adapter)
    for layer_idx in range(depth):
        prefix = f"{adapter.attention_name(layer_idx)}."
        parts = tuple(f"{prefix}{name}." for name in absent_parts(layer_idx, settings, depth))
        adapted = {name: tensor for name, tensor in adapted.items() if not name.startswith(parts)}
        like = state[f"{prefix}q_proj.weight"]
        for name in residual_parts(layer_idx, settings, depth):
            wide = torch.promote_types(like.dtype, torch.float32)
            adapted[prefix + name] = torch.nn.Parameter(no_residual().to(like.device, wide))
    return adapted


def _means(state: dict[str, Tensor], kv_map: KVMap, projection: str, adapter: HostAdapter) -> dict[str, Tensor]:
    """Weights and biases of every owner's projection, averaged over the layers that read it."""
    means: dict[str, Tensor] = {}
    for owner in kv_map.owners:
        readers = [f"{adapter.attention_name(reader)}.{projection}" for reader in kv_map.readers(owner)]
        for kind in ("weight", "bias"):
            if len(readers) > 1 and f"{readers[0]}.{kind}" in state:
                stacked = torch.stack([state[f"{reader}.{kind}"].detach().double() for reader in readers])
                means[f"{adapter.attention_name(owner)}.{projection}.{kind}"] = stacked.mean(0)
    return means
