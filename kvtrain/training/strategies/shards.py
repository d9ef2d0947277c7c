"""A model that was built on the meta device gets its layers sharded, and every rank fills its own part."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.futures import Future

from kvtrain.errors import UsageError


def shard_layers(model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard a model by FSDP2: every layer by itself, and the rest, embeddings and head, with the root.

    Parts that the model keeps in float32 are never computed in less.

    Args:
        model: A ``PreTrainedModel`` whose base model has ``layers``.
        mesh: Of one dimension, or of two: copies, and shards of each.
        policy: In which types to compute and to sum gradients.
    """
    wide = set(model._keep_in_fp32_modules_strict or ())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wide and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for layer in model.base_model.layers.children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def materialize(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give memory to a sharded model, and read every rank's part of the weights into it.

    Args:
        model: Sharded, on the meta device.
        weights: Whole tensors by name, most of them mapped from files: what a rank does not keep is never copied.
        device: This rank's.

    Raises:
        UsageError: A weight is missing, or has another shape.
    """
    model.to_empty(device=device)
    compute_buffers(model)
    read_parts(stored_tensors(model), weights)


def materialize_from_first_rank(model: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Give memory to a sharded model, and spread what the first rank has built, one tensor at a time.

    Args:
        model: Sharded, on the meta device.
        whole: The same model in memory, on the first rank; None elsewhere.
        device: This rank's.
    """
    model.to_empty(device=device)
    values = dict(whole.named_parameters()) | dict(whole.named_buffers()) if whole is not None else {}
    for name, target in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if whole is None:
            value = torch.empty(target.shape, dtype=target.dtype, device=device)
        else:
            value = values[name].detach().to(device, target.dtype).contiguous()
        torch.distributed.broadcast(value, 0)
        read_parts({name: target}, {name: value})


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a model's files hold, by name, ties once."""
    persistent = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return parameters | buffers


def read_parts(targets: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy this rank's part of whole tensors into sharded or plain ones, cast to their types.

    Raises:
        UsageError: A tensor is missing, or has another shape.
    """
    found = {name: fitting(name, target.shape, whole) for name, target in targets.items()}
    state = {name: target.detach() for name, target in targets.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no other rank is asked is meant
        load(state, storage_reader=_WholeTensors(found), no_dist=True)


def fitting(name: str, shape: torch.Size, weights: Mapping[str, Tensor]) -> Tensor:
    """A weight of a base.

    Raises:
        UsageError: It is missing, or has another shape.
    """
    if name not in weights:
        raise UsageError(f"the base has no weights {name!r}, which this model needs")
    if weights[name].shape != shape:
        here, there = tuple(shape), tuple(weights[name].shape)
        raise UsageError(f"{name} of the base is {there}, where its config.json says {here}")
    return weights[name]


def compute_buffers(model: nn.Module) -> None:
    """Compute what no file holds, such as rotary frequencies."""
    for name, module in model.named_modules():
        if module._non_persistent_buffers_set:
            compute: Any = getattr(module, "reset_parameters", None)
            assert compute is not None and not list(module.parameters(recurse=False)), name
            compute()


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one has gathered: the root's parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class _WholeTensors(StorageReader):
    """Whole tensors as a checkpoint, of which torch finds out what each rank needs."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: there is one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor is one chunk."""
        described: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)
            properties = TensorProperties(dtype=tensor.dtype)
            described[name] = TensorStorageMetadata(properties, tensor.shape, [chunk])
        return Metadata(described, storage_data={MetadataIndex(name): None for name in described})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts that were asked for."""
        for item in plan.items:
            part = self.tensors[item.storage_index.fqn]
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """None is read by its name."""
        return False
