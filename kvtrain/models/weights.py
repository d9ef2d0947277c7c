"""Weights that are read when they are looked at: those of a Hugging Face folder lie in its files until then."""

from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from kvtrain.errors import UsageError
from kvtrain.models.hosts import host_adapter


class StoredWeights(Mapping[str, Tensor]):
    """Weights by name, each read when it is asked for.

    Args:
        names: Where each is stored, by name.
        read: Reads what is stored under a name.
    """

    def __init__(self, names: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        """Read one, whole."""
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


def host_weights(path: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Weights of a causal language model by name, mapped from its files: none is read before it is looked at.

    Args:
        path: Folder or Hub id.
        config: Its configuration.

    Returns:
        All that ``config`` asks for, ties under both names, in the types of the files.

    Raises:
        UsageError: There are no safetensors, or a weight is missing.
    """
    mapped = host_adapter(config).stored_weights(map_weights(path), config)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict(keep_vars=True)
    present = {id(tensor): mapped[name] for name, tensor in expected.items() if name in mapped}
    missing = [name for name, tensor in expected.items() if id(tensor) not in present]
    if missing:
        raise UsageError(f"{path}: its files lack {missing[0]}, which its config.json asks for; save the base anew")
    return {name: present[id(tensor)] for name, tensor in expected.items()}


def map_weights(path: str) -> dict[str, Tensor]:
    """Every tensor of a model's safetensors by name, mapped from the files.

    Raises:
        UsageError: There are none.
    """
    weights: dict[str, Tensor] = {}
    for file in _files(path):
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return weights


def _files(path: str) -> list[str]:
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        files: list[str] = get_checkpoint_shard_files(path, index)[0]
        return files
    single = cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise UsageError(f"{path}: no safetensors to read parts of; save the base anew with save_pretrained")
    return [single]
