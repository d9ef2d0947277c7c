"""A sharded training as a checkpoint of torch's distributed form, and back, on any number of ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kvtrain.durable import unwrapped, writing
from kvtrain.errors import UsageError
from kvtrain.models.sharded import REST, WEIGHTS, ShardedReader, plain_errors

_OPTIMIZER = "optimizer.{}."  # and its kind of number, and the parameter's name


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Moments by kind and parameter's name, and settings, with names in place of parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    state = {f"{kind}.{names[p]}": value for p, values in optimizer.state.items() for kind, value in values.items()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def save_sharded(checkpoint: dict[str, Any], folder: Path, first: bool) -> None:
    """Write Lightning's checkpoint as a folder; every rank calls it.

    Args:
        checkpoint: With tensors of ``state_dict`` and of ``optimizer_state``.
        folder: Where.
        first: Whether this is the rank that writes what is no tensor.

    Raises:
        OSError: A rank could not write; the error names the folder or a file in it.
    """
    tensors: dict[str, Tensor] = {WEIGHTS + name: value for name, value in checkpoint["state_dict"].items()}
    groups = []
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        tensors |= {_OPTIMIZER.format(index) + name: value for name, value in optimizer["state"].items()}
        groups.append(optimizer["param_groups"])
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    with plain_errors(folder, RuntimeError):
        save(tensors, storage_writer=_ShardWriter(folder, {**rest, "param_groups": groups} if first else None))


class _ShardWriter(FileSystemWriter):
    """Fails with the system's error itself: ranks tell each other of errors, and not of what these came from.

    Args:
        folder: The checkpoint.
        rest: What is no tensor, on the rank that writes it: here, where the others hear of a failure.
    """

    def __init__(self, folder: Path, rest: dict[str, Any] | None) -> None:
        super().__init__(folder)
        self._folder, self._rest = folder, rest

    def write_data(self, *args: Any, **kwargs: Any) -> Future[list[WriteResult]]:
        """As torch's, and what is no tensor."""
        if self._rest is not None:
            with writing(self._folder / REST) as file:
                torch.save(self._rest, file)
        with unwrapped():
            return super().write_data(*args, **kwargs)


def load_sharded(
    folder: Path, module: nn.Module, targets: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], strict: bool
) -> dict[str, Any]:
    """Read what ``save_sharded`` wrote, in place; every rank reads its own part.

    Args:
        folder: The checkpoint.
        module: The training module.
        targets: Its weights by name.
        optimizers: Its optimizers; none to read weights alone.
        strict: Whether all weights must be there.

    Returns:
        What is no tensor.

    Raises:
        UsageError: It is of another model.
    """
    reader = ShardedReader(folder)
    rest, found = reader.rest(), reader.tensors()
    weights = {WEIGHTS + name: target.detach() for name, target in targets.items() if strict or WEIGHTS + name in found}
    _check_fit(folder, weights, found)
    moments = [_moments(index, module, found) for index in range(len(optimizers))]
    state = dict(weights)
    for part in moments:
        state |= part
    reader.read_into(state)
    for index, (optimizer, part) in enumerate(zip(optimizers, moments, strict=True)):
        _restore_optimizer(optimizer, module, part, rest["param_groups"][index], _OPTIMIZER.format(index))
    return rest


def _check_fit(folder: Path, weights: dict[str, Tensor], found: dict[str, TensorStorageMetadata]) -> None:
    here = {name: tuple(weight.shape) for name, weight in weights.items()}
    there = {name: tuple(described.size) for name, described in found.items() if name.startswith(WEIGHTS)}
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            sizes = f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            raise UsageError(f"{folder}: of another model, {name.removeprefix(WEIGHTS)} is {sizes}")


def _moments(index: int, module: nn.Module, found: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Empty tensors for an optimizer's moments, sharded as their parameters are."""
    parameters, prefix = dict(module.named_parameters()), _OPTIMIZER.format(index)
    moments: dict[str, Tensor] = {}
    for key, described in found.items():
        if key.startswith(prefix):
            parameter = parameters[key.removeprefix(prefix).partition(".")[2]]
            size, dtype = described.size, described.properties.dtype
            alike = size == parameter.shape  # and not the count of steps
            moments[key] = torch.zeros_like(parameter, dtype=dtype) if alike else torch.zeros(size, dtype=dtype)
    return moments


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    moments: dict[str, Tensor],
    groups: list[dict[str, Any]],
    prefix: str,
) -> None:
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, value in moments.items():
        kind, _, name = key.removeprefix(prefix).partition(".")
        optimizer.state[parameters[name]][kind] = value.detach()
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
