"""Parameters under ZeRO: how they are read and written between two steps, masters included."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.training.strategies.base import PlainParameters, row_mask
from kvtrain.training.strategies.partitions import stretch


def gathered(parameter: Any) -> AbstractContextManager[None]:
    """Where a parameter is whole on every rank, and what the first one writes is written."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return context


class ZeRO2Parameters(PlainParameters):
    """Under ZeRO-2 every rank has the working copy whole, and a part of the masters."""

    mark = "_hp_mapping"

    def zero_rows(self, parameter: Any, rows: slice) -> None:
        """See ``PlainParameters``; the masters too."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        super().zero_rows(parameter, rows)
        master = safe_get_full_fp32_param(parameter)
        master[rows] = 0
        safe_set_full_fp32_param(parameter, master)

    def clamp(self, parameter: Any, low: float, high: float) -> None:
        """See ``PlainParameters``; the masters too."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        super().clamp(parameter, low, high)
        safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).clamp(low, high))


class ZeRO3Parameters(PlainParameters):
    """Under ZeRO-3 every rank has a part of everything."""

    mark = "ds_id"

    def shape(self, parameter: Any) -> torch.Size:
        """See ``PlainParameters``; while nobody uses it, a parameter is an empty vector."""
        return torch.Size(parameter.ds_shape)

    def whole(self, parameter: Any) -> Tensor:
        """See ``PlainParameters``."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return super().whole(parameter)

    def zero_rows(self, parameter: Any, rows: slice) -> None:
        """See ``PlainParameters``; the masters too, part by part: writing them whole fails where parts are uneven."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        with gathered(parameter):
            super().zero_rows(parameter.data, rows)
        if parameter.requires_grad:
            master = safe_get_local_fp32_param(parameter).clone()
            mask = local_part(row_mask(master, parameter.ds_shape, rows), master.numel())
            safe_set_local_fp32_param(parameter, master.masked_fill_(mask, 0))

    def clamp(self, parameter: Any, low: float, high: float) -> None:
        """See ``PlainParameters``; the masters too."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        with gathered(parameter):
            super().clamp(parameter.data, low, high)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(low, high))


def local_part(whole: Tensor, size: int) -> Tensor:
    """This rank's stretch of a flattened tensor, padded at the end as ZeRO-3 pads it."""
    part = stretch(whole, size)
    return nn.functional.pad(part, (0, size - part.numel()))


def clear_partitioned_moments(optimizer: Any) -> None:
    """Zero in place: DeepSpeed holds views of these tensors, which ``state.clear()`` would leave stale."""
    for state in optimizer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
