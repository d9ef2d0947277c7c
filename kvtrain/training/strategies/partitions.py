"""A model that was built on the meta device gets ZeRO-3's partitions, and every rank reads its own from files."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.training.strategies.shards import compute_buffers, fitting, stored_tensors

# Settings of zero_optimization under which a rank keeps more of the weights, or other forms of them, than its stretch.
_MORE_THAN_A_STRETCH = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights")


def reads_partitions(zero: Mapping[str, Any]) -> bool:
    """Whether a rank keeps a stretch of every parameter and no more, so that it need not see the rest.

    Args:
        zero: DeepSpeed's ``zero_optimization``.
    """
    return zero.get("stage") == 3 and all(zero.get(key, False) in (False, 1) for key in _MORE_THAN_A_STRETCH)


def half_precision(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type that DeepSpeed's configuration gives all parameters; None where they keep their own."""
    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    return next((dtype for key, dtype in types.items() if config.get(key, {}).get("enabled")), None)


def partition(model: nn.Module, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Partition a model under ZeRO-3; no rank ever holds one of its weights whole.

    DeepSpeed itself has the first rank spread whole weights, which each rank would have to hold for the time.

    Args:
        model: On the meta device.
        weights: Whole tensors by name, most of them mapped from files: what a rank does not keep is never copied.
        config: DeepSpeed's, which ``deepspeed.initialize`` gets too.

    Raises:
        UsageError: A weight is missing, or has another shape.
    """
    import deepspeed

    # With a module, of no parameters, it also has linear layers keep no gathered weights for the backward pass.
    context = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
    half = half_precision(config)
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # ties once
        weight = fitting(name, parameter.shape, weights)
        empty = torch.empty(parameter.shape, dtype=half or parameter.dtype, device=context.local_device)
        placed[parameter] = nn.Parameter(empty, parameter.requires_grad)
        del empty
        _partition_parameter(placed[parameter], weight, context)
    for module in model.modules():
        for key, own in module._parameters.items():
            if own is not None:
                module._parameters[key] = placed[own]
    _fill_buffers(model, weights, context.local_device)


@torch.no_grad()
def _partition_parameter(parameter: Any, weight: Tensor, context: Any) -> None:
    """Have DeepSpeed cut a parameter that nobody has written to, and write this rank's stretch."""
    context._convert_to_deepspeed_param(parameter)
    parameter.partition()
    own = stretch(weight, parameter.ds_tensor.numel())
    parameter.ds_tensor[: own.numel()].copy_(own)
    parameter.ds_tensor[own.numel() :].zero_()


def stretch(whole: Tensor, size: int) -> Tensor:
    """This rank's stretch of a flattened tensor, whose last ones may be shorter than ``size``, or empty."""
    start = torch.distributed.get_rank() * size
    return whole.flatten()[start : start + size]


@torch.no_grad()
def _fill_buffers(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give memory to buffers, which are whole on every rank; parameters are partitioned by now, and hold nothing."""
    model.to_empty(device=device)
    compute_buffers(model)
    parameters = dict(model.named_parameters())
    for name, buffer in stored_tensors(model).items():
        if name not in parameters:
            buffer.copy_(fitting(name, buffer.shape, weights))
