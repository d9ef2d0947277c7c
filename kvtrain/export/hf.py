"""A run folder becomes a Hugging Face folder: safetensors, configuration, tokenizer, model card."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvtrain.assets import resolve
from kvtrain.data.shards import new_folder, require_new
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import explain_load_errors, first_line
from kvtrain.export.card import model_card
from kvtrain.models.checkpoint import read_checkpoint
from kvtrain.models.config import CHECKPOINT_KEY, KVTrainConfig
from kvtrain.models.host import KVTrainMixin, retrofit, retrofitted_class
from kvtrain.models.registry import own_model_class
from kvtrain.run_folder import last_checkpoint, require_intact

MAX_SHARD_SIZE = "5GB"

logger = logging.getLogger("kvtrain")


def export_run(
    run: Path, output: Path, push_to: str | None = None, private: bool = False, dtype: str = "bfloat16"
) -> Path:
    """Write a run's last checkpoint as an HF folder; nothing is left there on failure.

    A run whose method is ``Full()``, all settings left alone, becomes a plain folder of its host.

    Args:
        run: Run folder of ``kvtrain fit``, or one ``.ckpt`` file in it.
        output: New folder.
        push_to: Hub repository to upload to, ``org/name``.
        private: Make that repository private.
        dtype: Of the weights: ``bfloat16``, ``float16`` or ``float32``.

    Raises:
        ValueError: No checkpoint, one without export data, an existing output, or no token to push with.
    """
    require_new(output)
    stored = _dtype(dtype)
    if push_to:
        require_push(push_to)
    checkpoint = read_checkpoint(checkpoint_path(run))
    settings = json.loads(checkpoint[CHECKPOINT_KEY])
    if reason := settings.get("unfinished"):
        logger.warning("%s: not for use yet: %s", run, reason)
    tokenizer = load_tokenizer(settings["tokenizer"]) if settings["tokenizer"] else None
    model = rebuild_model(checkpoint)
    if isinstance(model, KVTrainMixin):
        model.builder.deploy(model)
    _cast(model, stored)
    with new_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(model, run if run.is_dir() else run.parent.parent))
    if push_to:
        push_folder(output, push_to, private)
    return output


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store weights in a type, but for those that the model says must stay in float32."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            wide = any(part in kept for part in name.split("."))
            tensor.data = tensor.data.to(torch.float32 if wide else dtype)


def checkpoint_path(run: Path) -> Path:
    """The checkpoint that a run folder (or a checkpoint file itself) stands for.

    Raises:
        ValueError: There is none, it is sharded, or it is not what the run's manifest says was written.
    """
    last = run if run.is_file() else last_checkpoint(run)
    if last is not None and last.is_dir():
        raise ValueError(f"{last}: sharded by DeepSpeed as pickles, which kvtrain does not read; export needs one file")
    if last is None:
        raise ValueError(f"{run}: no checkpoint; is this a run folder of `kvtrain fit`?")
    require_intact(last, last.resolve().parent.parent)
    return last


def rebuild_model(checkpoint: dict[str, Any]) -> PreTrainedModel:
    """The trained model: a retrofitted one, the plain host where its method is that, or one without a host."""
    settings = json.loads(checkpoint[CHECKPOINT_KEY])
    stored = dict(settings["config"])
    config: Any = AutoConfig.for_model(stored.pop("model_type"), **stored)
    if base := settings.get("base"):
        return _on_base(base, config, model_weights(checkpoint))
    if own := own_model_class(config):
        model: PreTrainedModel = own(config)
    elif config.method.is_host:
        host_config = config.host_config
        host_config._attn_implementation = None
        model = AutoModelForCausalLM.from_config(host_config)
    else:
        model = retrofitted_class(config.host_config)(config)
    model.load_state_dict(model_weights(checkpoint))
    model.eval()
    return model


def _on_base(base: str, config: KVTrainConfig, learnt: dict[str, Tensor]) -> PreTrainedModel:
    """A retrofit whose checkpoint holds what was learnt alone.

    Raises:
        ValueError: The base cannot be had, or is another one.
    """
    path = resolve(base)
    with explain_load_errors(base, "the base of this run; put it there again, then export"):
        host = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = retrofit(host, config.method)
    model.eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in learnt.items():
        if shapes.get(name) != tensor.shape:
            raise ValueError(f"{base}: not the base that was trained on, {name} does not fit; restore it, then export")
    model.load_state_dict(learnt, strict=False)
    return model


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's own state dict inside a training module's."""
    prefix = "model."
    weights = checkpoint["state_dict"].items()
    return {name.removeprefix(prefix): tensor for name, tensor in weights if name.startswith(prefix)}


def require_push(repository: str) -> None:
    """Make sure, before anything is written, that a folder can be uploaded.

    Raises:
        ValueError: No token, or no name of a repository.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"a Hub repository is named org/name, not {repository!r}")
    if not get_token():
        raise ValueError("pushing needs a token: run `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder to the Hub.

    Raises:
        ValueError: No token, or the Hub refused; a token is never part of the message.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    require_push(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{repository}: the Hub refused the upload ({first_line(error)}); {folder} is complete"
        ) from error


def _dtype(name: str) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, not {name!r}")
    return known[name]
