"""What a Hugging Face folder must hold before anybody is given it; nothing in it is run."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import UsageError, explain_load_errors, first_line
from kvtrain.models.config import KVTrainConfig

_REMEDY = "write the folder anew with `kvtrain export`"
_READS_TEXT = ("ForCausalLM", "ForMaskedLM")


def check_folder(folder: Path) -> list[Path]:
    """Make sure that a folder holds a model that opens, whole.

    Args:
        folder: As ``kvtrain export`` or ``save_pretrained`` writes it.

    Returns:
        Its files, in the order of their names; hidden ones are left out.

    Raises:
        UsageError: It is none, a part is missing or damaged, or this kvtrain is older than what wrote it.
    """
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is a run folder; write its model with `kvtrain export {folder} OUT`")
    if not (folder / CONFIG_NAME).is_file():
        raise UsageError(f"{folder}: no {CONFIG_NAME}; give a folder that `kvtrain export` has written")
    config = _read_config(folder)
    _check_weights(folder)
    _check_tokenizer(folder, config)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _read_config(folder: Path) -> PreTrainedConfig:
    """The configuration, as this kvtrain understands it."""
    with explain_load_errors(str(folder), "update kvtrain and transformers if newer ones wrote it"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if isinstance(config, KVTrainConfig):
        try:
            _ = config.method
        except ValueError as error:
            raise UsageError(f"{folder}: {error}; a newer kvtrain may have written it: update kvtrain") from error
    return config


def _check_weights(folder: Path) -> None:
    """Every weight that the index names, or that one file holds, can be read."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        if not (folder / SAFE_WEIGHTS_NAME).is_file():
            raise UsageError(f"{folder}: neither {SAFE_WEIGHTS_NAME} nor {index.name}; {_REMEDY}")
        _stored_names(folder / SAFE_WEIGHTS_NAME)
        return
    expected: dict[str, set[str]] = {}
    for name, file in _read_index(index).items():
        expected.setdefault(file, set()).add(name)
    for file, names in expected.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise UsageError(f"{index}: names {file}, which is not there; {_REMEDY}")
        if lost := names - _stored_names(folder / file):
            raise UsageError(f"{folder / file}: lacks {min(lost)}, which {index.name} says is there; {_REMEDY}")


def _read_index(index: Path) -> dict[str, str]:
    """Which file holds which weight."""
    try:
        files: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{index}: no index of weights ({first_line(error)}); {_REMEDY}") from error


def _stored_names(file: Path) -> set[str]:
    """What a file of weights holds; opening it compares its header with its size."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: damaged or cut short ({first_line(error)}); {_REMEDY}") from error


def _check_tokenizer(folder: Path, config: PreTrainedConfig) -> None:
    """Models that read or write text have one; a classifier of something else may do without."""
    reads_text = str((config.architectures or [""])[0]).endswith(_READS_TEXT)
    if reads_text or (folder / "tokenizer_config.json").is_file():
        try:
            load_tokenizer(str(folder))
        except ValueError as error:
            raise UsageError(f"{error}; save the model's tokenizer there first") from error
