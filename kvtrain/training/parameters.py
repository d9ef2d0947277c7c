"""What a phase boundary does to parameters and optimizer, wherever the strategy keeps them.

Plain parameters are written in place. FSDP2 shards them as ``DTensor``. DeepSpeed's ZeRO keeps a float32
master copy beside the working one, whole or in parts, and overwrites the working copy from it at every
step: both have to change, or the next step undoes what was done.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def zero_rows(parameter: Tensor, rows: slice) -> None:
    """Set rows of a parameter to zero under any strategy; every rank calls it, between two steps.

    Args:
        parameter: A matrix or a vector.
        rows: Along its first dimension.
    """
    if isinstance(parameter, DTensor):
        _zero_sharded_rows(parameter, rows)
    elif hasattr(parameter, "ds_id"):
        _zero_stage_3_rows(parameter, rows)
    else:
        parameter[rows] = 0
        if hasattr(parameter, "_hp_mapping"):
            _zero_stage_2_master_rows(parameter, rows)


@torch.no_grad()
def clamp_parameter(parameter: Tensor, low: float, high: float) -> None:
    """Clip every number of a parameter under any strategy; every rank calls it, between two steps.

    Args:
        parameter: Of any shape.
        low: Smallest value.
        high: Largest value.
    """
    if isinstance(parameter, DTensor):
        parameter.to_local().clamp_(low, high)
    elif hasattr(parameter, "ds_id"):
        _clamp_stage_3(parameter, low, high)
    else:
        parameter.clamp_(low, high)
        if hasattr(parameter, "_hp_mapping"):
            _clamp_stage_2_master(parameter, low, high)


def whole(parameter: Tensor) -> Tensor:
    """A copy of all of a parameter, wherever its parts lie; every rank calls it."""
    if isinstance(parameter, DTensor):
        gathered: Tensor = parameter.full_tensor()
        return gathered.detach()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def clear_moments(trainer: pl.Trainer) -> None:
    """Let the optimizers start anew: no moments, no steps taken.

    Args:
        trainer: In the middle of a fit.
    """
    optimizers: list[Any] = trainer.optimizers  # under DeepSpeed they are none of torch's
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.state.clear()
        else:
            _clear_partitioned_moments(optimizer)


def _row_mask(parameter: Tensor, shape: torch.Size, rows: slice) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool, device=parameter.device)
    mask[rows] = True
    return mask


def _zero_sharded_rows(parameter: DTensor, rows: slice) -> None:
    mask = distribute_tensor(_row_mask(parameter, parameter.shape, rows), parameter.device_mesh, parameter.placements)
    parameter.to_local().masked_fill_(mask.to_local(), 0)


def _zero_stage_2_master_rows(parameter: Tensor, rows: slice) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    master[rows] = 0
    safe_set_full_fp32_param(parameter, master)


def _zero_stage_3_rows(parameter: Any, rows: slice) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data[rows] = 0
    if parameter.requires_grad:
        # The part, not the whole: writing the whole back fails where ranks do not divide the parameter evenly.
        master = safe_get_local_fp32_param(parameter).clone()
        mask = _local_part(_row_mask(master, parameter.ds_shape, rows), master.numel())
        safe_set_local_fp32_param(parameter, master.masked_fill_(mask, 0))


def _clamp_stage_2_master(parameter: Tensor, low: float, high: float) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).clamp(low, high))


def _clamp_stage_3(parameter: Any, low: float, high: float) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.clamp_(low, high)
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(low, high))


def _local_part(whole: Tensor, size: int) -> Tensor:
    """This rank's stretch of a flattened tensor, padded at the end as ZeRO-3 pads it."""
    start = torch.distributed.get_rank() * size
    part = whole.flatten()[start : start + size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _clear_partitioned_moments(optimizer: Any) -> None:
    """Zero in place: DeepSpeed holds views of these tensors, which ``state.clear()`` would leave stale."""
    for state in optimizer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
