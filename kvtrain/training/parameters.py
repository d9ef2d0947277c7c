"""What a phase boundary does to parameters and optimizer, wherever the strategy keeps them."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from kvtrain.training.strategies.base import PlainParameters
from kvtrain.training.strategies.fsdp2 import ShardedParameters
from kvtrain.training.strategies.zero_parameters import ZeRO2Parameters, ZeRO3Parameters, clear_partitioned_moments

_KINDS = (ShardedParameters(), ZeRO3Parameters(), ZeRO2Parameters(), PlainParameters())


def _kind(parameter: Tensor) -> PlainParameters:
    for kind in _KINDS:
        if hasattr(parameter, kind.mark):
            return kind
    raise AssertionError("every tensor has the mark of plain ones")


@torch.no_grad()
def zero_rows(parameter: Tensor, rows: slice) -> None:
    """Set rows of a parameter to zero under any strategy; every rank calls it, between two steps.

    Args:
        parameter: A matrix or a vector.
        rows: Along its first dimension.
    """
    _kind(parameter).zero_rows(parameter, rows)


@torch.no_grad()
def clamp_parameter(parameter: Tensor, low: float, high: float) -> None:
    """Clip every number of a parameter under any strategy; every rank calls it, between two steps.

    Args:
        parameter: Of any shape.
        low: Smallest value.
        high: Largest value.
    """
    _kind(parameter).clamp(parameter, low, high)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of all of a parameter, wherever its parts lie."""
    return _kind(parameter).shape(parameter)


def whole(parameter: Tensor) -> Tensor:
    """A copy of all of a parameter, wherever its parts lie; every rank calls it."""
    return _kind(parameter).whole(parameter)


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
            clear_partitioned_moments(optimizer)
