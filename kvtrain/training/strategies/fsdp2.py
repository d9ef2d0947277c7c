"""FSDP2 under Lightning: every rank keeps a part of parameters, gradients and optimizer, and reads its own rows."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from kvtrain.errors import UsageError, require_at_least
from kvtrain.kernels.context_parallel import WHOLE_ROWS, ContextParallel
from kvtrain.kernels.ulysses import Ulysses
from kvtrain.models.sharded import is_sharded
from kvtrain.training.strategies.base import (
    SAME_STRATEGY,
    BuildsModel,
    BuildsTeacher,
    PlainParameters,
    StrategyTraits,
    gradients,
    row_mask,
)
from kvtrain.training.strategies.sharded_state import load_sharded, optimizer_state, save_sharded
from kvtrain.training.strategies.shards import (
    materialize,
    materialize_from_first_rank,
    reshard,
    shard_layers,
    stored_tensors,
)

# Gradients are summed in float32 in any case, masters and moments kept in it.
_POLICIES = {
    "32-true": MixedPrecisionPolicy(cast_forward_inputs=False),
    "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
}
logger = logging.getLogger("kvtrain")


class FSDP2(StrategyTraits, ModelParallelStrategy):
    """Parameters, gradients and optimizer sharded over all ranks by torch's ``fully_shard``, layer by layer.

    A pretrained base is read straight into the shards: no rank ever holds it whole. Under ``bf16-mixed`` layers compute
    in bfloat16, from float32 masters. All ranks read rows of their own, unless groups of them share rows.

    Args:
        data_parallel_replicate_size: Copies of the model, each sharded over its part of the ranks (HSDP): as many as
            nodes, and layers are gathered within a node alone.
        context_parallel: Neighbouring ranks that read the same rows, each a part of every row's tokens, and trade
            tokens for heads around attention (DeepSpeed-Ulysses, arXiv 2309.14509): for rows too long for one device.
            It divides the tokens of a row, the key-value heads and the ranks of a copy.

    Attributes:
        parallel: How this rank shares rows, once the ranks are known.

    Raises:
        ValueError: No copy or no rank, or, once the run is known, a number that does not divide what it must.
    """

    def __init__(self, data_parallel_replicate_size: int = 1, context_parallel: int = 1) -> None:
        require_at_least(1, "data_parallel_replicate_size", data_parallel_replicate_size)
        require_at_least(1, "context_parallel", context_parallel)
        super().__init__()
        self.data_parallel_replicate_size = data_parallel_replicate_size
        self.context_parallel = context_parallel
        self.parallel: ContextParallel = WHOLE_ROWS

    @property
    def precision_plugin(self) -> Precision:
        """Computes as it is told by the sharded layers, and knows how to clip."""
        plugin: Precision = super().precision_plugin
        return plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and plugin.precision not in _POLICIES:
            raise UsageError(f"trainer.precision {plugin.precision} under fsdp2: take {' or '.join(_POLICIES)}")
        self._precision_plugin = None if plugin is None else _ShardedPrecision(plugin.precision)

    def setup_environment(self) -> None:
        """Start the processes' connection, and lay the ranks out.

        Raises:
            UsageError: Copies do not divide the ranks, or ranks cannot share rows.
        """
        copies = self.data_parallel_replicate_size
        self._check_layout()
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        if self.context_parallel > 1:
            group, _ = torch.distributed.new_subgroups(self.context_parallel, timeout=self._timeout)
            self.parallel = Ulysses(group)
        device = self.root_device.type
        if copies == 1:
            self._device_mesh = init_device_mesh(device, (self.world_size,), mesh_dim_names=("shard",))
        else:
            sizes = (copies, self.world_size // copies)
            self._device_mesh = init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard"))
            assert self._timeout is not None  # Lightning's, or trainer.timeout_minutes
            for group in self._device_mesh.get_all_groups():  # made with torch's own timeout
                _set_pg_timeout(self._timeout, group)

    def _check_layout(self) -> None:
        """Refuse numbers that do not divide what they must, before ranks meet."""
        shared = self.context_parallel
        require_layout(self.data_parallel_replicate_size, shared, self.num_nodes * self.num_processes)
        if shared > 1:
            data = getattr(self._module.trainer, "datamodule", None)
            require_context_parallel(self._module, getattr(data, "length_multiple", None), shared)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads rows of its own, or every group of ranks that share them."""
        shared = self.context_parallel
        return {"num_replicas": self.world_size // shared, "rank": self.global_rank // shared}

    def build_model(self, module: BuildsModel) -> Any:
        """See ``StrategyTraits``: on the meta device, then sharded, then filled."""
        model = module.build_meta_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(module.is_trainable(name))
        self._shard(model)
        weights = module.pretrained_weights()
        if weights is not None:
            materialize(model, weights, self.root_device)
            return model
        logger.info("rank 0 makes the model whole, on its CPU, and spreads it: it has no files to be read from")
        materialize_from_first_rank(model, module.build_model() if self.is_global_zero else None, self.root_device)
        return model

    def build_teacher(self, module: BuildsTeacher) -> Any:
        """See ``StrategyTraits``; sharded as the model is."""
        teacher = module.build_meta_teacher().requires_grad_(False)
        self._shard(teacher)
        materialize(teacher, module.teacher_weights(), self.root_device)
        return teacher.eval()

    def _shard(self, model: Any) -> None:
        model.context_parallel = self.parallel
        shard_layers(model, self.device_mesh, _POLICIES[self.precision_plugin.precision])

    def setup(self, trainer: pl.Trainer) -> None:
        """As Lightning's; what is no part of the model is the same on all ranks and stays so."""
        super().setup(trainer)
        self._replicated = [p for p in self._module.parameters() if p.requires_grad and not isinstance(p, DTensor)]

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average gradients of parameters that are no part of the model; those of earlier batches are equal already."""
        for parameter in self._replicated:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's. Without a backward pass the root's parameters would stay gathered, and hide their shards."""
        try:
            return super().validation_step(*args, **kwargs)
        finally:
            reshard(self._module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts, ties once."""
        return {name: tensor.detach() for name, tensor in stored_tensors(self._module).items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This rank's parts."""
        return optimizer_state(self._module, getattr(optimizer, "_optimizer", optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder of torch's distributed form; every rank writes its part."""
        assert storage_options is None
        save_sharded(checkpoint, Path(self.broadcast(filepath)), self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read such a folder, written by any number of ranks.

        Raises:
            UsageError: It is something else, or of another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        self.require_checkpoint(path)
        fits = self._module.trainer.state.fn == TrainerFn.FITTING
        return load_sharded(
            path,
            self._module,
            stored_tensors(self._module),
            self.optimizers if fits else [],
            strict=self._module.strict_loading,
        )

    def require_checkpoint(self, path: Path, fits: bool = True) -> None:
        """See ``StrategyTraits``.

        Raises:
            UsageError: It is another strategy's.
        """
        if not is_sharded(path):
            raise UsageError(f"{path}: not written under fsdp2; {SAME_STRATEGY}")

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """See ``StrategyTraits``."""
        return _sharded_norm(gradients(optimizer))


def require_layout(copies: int, shared: int, ranks: int) -> None:
    """Make sure that each copy of the model has as many ranks, and each group of a copy that shares rows.

    Raises:
        UsageError: They do not divide the ranks.
    """
    if ranks % copies:
        raise UsageError(f"data_parallel_replicate_size is {copies}, which does not divide {ranks} ranks")
    if ranks // copies % shared:
        of = f"{ranks} ranks" if copies == 1 else f"the {ranks // copies} ranks of a copy"
        raise UsageError(f"context_parallel is {shared}, which does not divide {of}; lower it, or start more ranks")


def require_context_parallel(module: Any, tokens: int | None, ranks: int) -> None:
    """Make sure, before anything heavy, that ranks can share rows and train a module on them.

    Args:
        module: A ``TrainingModule``.
        tokens: A number that divides the length of every row; None where nobody knows one.
        ranks: How many share rows.

    Raises:
        UsageError: They cannot.
    """
    module.require_context_parallel(ranks)
    if tokens is not None and tokens % ranks:
        raise UsageError(
            f"context_parallel is {ranks}, which does not divide rows of {tokens} tokens, or multiples of that; "
            "set data.sequence_length to a multiple"
        )


class _ShardedPrecision(Precision):
    """Leaves types to ``fully_shard``; the norm that clips is over the parts of all ranks."""

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        """Scale all gradients so that their norm is ``clip_val`` at most."""
        found = gradients(optimizer)
        scale = (clip_val / (_sharded_norm(found) + 1e-6)).clamp(max=1.0)
        for gradient in found:
            local(gradient).mul_(scale)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which is the very tensor where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_norm(tensors: list[Tensor]) -> Tensor:
    """2-norm of tensors some of which are sharded; every rank calls it."""
    sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    norms = [torch.nn.utils.get_total_norm(part) for part in (sharded, plain) if part]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack(whole).norm() if len(whole) > 1 else whole[0]


class ShardedParameters(PlainParameters):
    """Under FSDP2 parameters, and with them masters, are ``DTensor``."""

    mark = "full_tensor"

    def whole(self, parameter: Any) -> Tensor:
        """See ``PlainParameters``."""
        gathered: Tensor = parameter.full_tensor()
        return gathered.detach()

    def zero_rows(self, parameter: Any, rows: slice) -> None:
        """See ``PlainParameters``."""
        mask = row_mask(parameter, parameter.shape, rows)
        mask = distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().masked_fill_(mask.to_local(), 0)

    def clamp(self, parameter: Any, low: float, high: float) -> None:
        """See ``PlainParameters``."""
        parameter.to_local().clamp_(low, high)
