"""A run, or a plain model with a method, becomes a Hugging Face folder: safetensors, configuration, tokenizer, card."""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kvtrain.assets import resolve
from kvtrain.data.shards import new_folder, require_new
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import UsageError, explain_load_errors
from kvtrain.export.card import model_card
from kvtrain.export.kept_adapter import ADAPTER_FOLDER, KeptAdapter, borrowed_of, take_adapter
from kvtrain.export.provenance import Provenance, base_provenance, read_provenance
from kvtrain.export.remote_code import remote_code, write_files
from kvtrain.export.weights import write_model
from kvtrain.models.adapters import LORA_KEY, LoRA, merged
from kvtrain.models.checkpoint import StoredModel, open_checkpoint
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.end_tokens import end_token_ids
from kvtrain.models.gqa import gqa_state
from kvtrain.models.host import retrofitted_class
from kvtrain.models.method import Method
from kvtrain.models.registry import builder, own_model_class
from kvtrain.models.sharded import is_sharded
from kvtrain.models.weights import StoredWeights, host_weights
from kvtrain.models.zero import is_zero
from kvtrain.run_folder import last_checkpoint, require_intact

logger = logging.getLogger("kvtrain")


def export_run(
    run: Path,
    output: Path,
    dtype: str = "bfloat16",
    with_code: bool = False,
    *,
    keep_adapter: bool = False,
    hub_id: str | None = None,
) -> Path:
    """Write a run's last checkpoint as an HF folder; nothing is left there on failure.

    A run whose method is ``Full()``, all settings left alone, becomes a plain folder of its host.

    Args:
        run: Run folder of ``kvtrain fit``, or one ``.ckpt`` file or folder in it.
        output: New folder.
        dtype: Of the weights: ``bfloat16``, ``float16`` or ``float32``.
        with_code: Write the model's code beside them, so that nobody needs kvtrain to open the folder.
        keep_adapter: Leave adapters out of the weights, and write them to ``adapter`` in the folder as PEFT does.
        hub_id: Where the folder will be found, for the adapter; the folder itself where absent.

    Raises:
        ValueError: No checkpoint, one without export data, an existing output, code that cannot travel, or no adapter
            to keep.
    """
    require_new(output)
    weight_type = _dtype(dtype)
    stored = open_checkpoint(checkpoint_path(run))
    if reason := stored.settings.get("unfinished"):
        logger.warning("%s: not for use yet: %s", run, reason)
    tokenizer = load_tokenizer(stored.settings["tokenizer"]) if stored.settings["tokenizer"] else None
    if tokenizer is not None and "chat_template" in stored.settings:
        tokenizer.chat_template = stored.settings["chat_template"]
    adapter = None
    if keep_adapter:
        stored, adapter = take_adapter(stored, run, hub_id or str(output))
    folder = run if is_run(run) else run.parent.parent
    return _write(stored, tokenizer, output, weight_type, with_code, (folder.name, read_provenance(folder)), adapter)


def export_plain(name: str, method: Method, output: Path, dtype: str = "bfloat16", with_code: bool = False) -> Path:
    """Write a plain model with a method in it as an HF folder, its weights as they are; nothing is left on failure.

    Args:
        name: Of the model: a folder, a Hub id, or ``kvtrain:tiny``.
        method: What to put into it; ``Full()``, all settings left alone, writes the plain model.
        output: New folder.
        dtype: As ``export_run`` takes it.
        with_code: As there.

    Raises:
        ValueError: There is no such model, it is no plain one or of no supported family, or as ``export_run``.
    """
    require_new(output)
    weight_type = _dtype(dtype)
    with explain_load_errors(name):
        host_config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    if isinstance(host_config, KVTrainConfig) or own_model_class(host_config):
        raise UsageError(f"{name} is of type {host_config.model_type} already; a method is given to a plain model")
    retrofitted_class(host_config)  # which refuses other families
    own = {"method_config": method.to_dict(), "dtype": host_config.dtype, "untrained": True}
    config = KVTrainConfig(text_config=host_config, **own)
    settings = {"config": json.loads(config.to_json_string(use_diff=False)), "tokenizer": name, "base": name}
    tokenizer, origin = load_tokenizer(name), (output.name, base_provenance(name))
    return _write(StoredModel(settings, {}), tokenizer, output, weight_type, with_code, origin)


def _write(
    stored: StoredModel,
    tokenizer: Any,
    output: Path,
    dtype: torch.dtype,
    with_code: bool,
    origin: tuple[str, Provenance],
    adapter: KeptAdapter | None = None,
) -> Path:
    """Write a folder; ``origin`` is what its card is called, and where the model comes from."""
    model, weights = rebuild_model(stored)
    code = remote_code(model.config) if with_code else {}
    with new_folder(output) as folder:
        write_model(model, weights, folder, dtype)
        write_files(code, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if adapter is not None:
            adapter.write(folder / ADAPTER_FOLDER)
        (folder / "README.md").write_text(model_card(model, *origin, bool(code)))
    return output


def checkpoint_path(run: Path) -> Path:
    """The checkpoint that a run folder (or a checkpoint file itself) stands for.

    Raises:
        ValueError: There is none, or it is not what the run's manifest says was written.
    """
    last = last_checkpoint(run) if is_run(run) else run
    if last is None or not last.exists():
        raise ValueError(f"{run}: no checkpoint; is this a run folder of `kvtrain fit`?")
    require_intact(last, last.resolve().parent.parent)
    return last


def is_run(path: Path) -> bool:
    """Whether a path is a run folder, and no checkpoint in one."""
    return path.is_dir() and not is_sharded(path) and not is_zero(path)


def rebuild_model(stored: StoredModel) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """The trained model, as it is served, on the meta device, and its weights, each read when it is asked for.

    It is a retrofitted model, the plain host where its method is that, or one without a host.
    """
    settings, weights = dict(stored.settings["config"]), stored.weights
    config: Any = AutoConfig.for_model(settings.pop("model_type"), **settings)
    base = stored.settings.get("base")
    if base:
        weights = _completed(stored, _base_weights(stored, config), config)
    if isinstance(config, KVTrainConfig):
        method, weights = builder(config.method, config.host_config).deploy(weights)
        config.method_config = method.to_dict()
    with torch.device("meta"):
        model = _model_of(config)
    if base:
        with contextlib.suppress(OSError):  # most bases have one
            model.generation_config = GenerationConfig.from_pretrained(resolve(base))
    if (stop := stored.settings.get("stop_token_id")) is not None:
        _end_at(model.generation_config, stop)
    return model.eval(), weights


def _end_at(generation: GenerationConfig, stop: int) -> None:
    """Let answers end at one more token."""
    if stop not in (ends := end_token_ids(generation)):
        generation.eos_token_id = [*ends, stop]


def _completed(stored: StoredModel, others: Mapping[str, Tensor], config: KVTrainConfig) -> Mapping[str, Tensor]:
    """All weights of a model whose checkpoint holds what was learnt alone; adapters are merged."""
    learnt, lora = stored.weights, stored.settings.get(LORA_KEY)
    if lora:
        return merged(others, learnt, LoRA(**lora), borrowed_of(config))
    names = {name: name for name in [*others, *learnt]}
    return StoredWeights(names, lambda name: (learnt if name in learnt else others)[name])


def _model_of(config: Any) -> PreTrainedModel:
    if own := own_model_class(config):
        model: PreTrainedModel = own(config)
    elif config.method.is_host:
        model = AutoModelForCausalLM.from_config(_plain(config.host_config))
    else:
        model = retrofitted_class(config.host_config)(config)
    return model


def _plain(host_config: Any) -> Any:
    """A host's configuration without the attention that a retrofit has chosen."""
    host_config._attn_implementation = None
    return host_config


def _base_weights(stored: StoredModel, config: KVTrainConfig) -> dict[str, Tensor]:
    """Weights of a retrofit whose checkpoint holds what was learnt alone, as they were before; mapped from files.

    Raises:
        ValueError: The base cannot be had, or is another one.
    """
    base, heads = stored.settings["base"], stored.settings.get("num_key_value_heads")
    path = resolve(base)
    with explain_load_errors(base, "the base of this run; put it there again, then export"):
        plain = AutoConfig.from_pretrained(path)
        weights = host_weights(path, plain)
        if heads:
            weights = gqa_state(weights, plain, heads)
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(_plain(config.host_config))
    shapes = {name: tensor.shape for name, tensor in host.state_dict().items()}
    for name in {**weights, **shapes}:
        if name not in weights or shapes.get(name) != weights[name].shape:
            raise ValueError(f"{base}: not the base that was trained on, {name} does not fit; restore it, then export")
    return builder(config.method, config.host_config).adapt_state(weights)


def _dtype(name: str) -> torch.dtype:
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, not {name!r}")
    return known[name]
