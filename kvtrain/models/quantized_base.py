"""Frozen weights in 8 or 4 bits while adapters train beside them (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Whole numbers of 8 bits, with a scale a row, are torchao's; NormalFloats of 4 bits, with a scale for every 64, those of
bitsandbytes. Products are computed in the type of what enters. An export merges adapters into the base's own weights,
not into these.
"""

import importlib.util
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kvtrain.errors import UsageError

Quantization = Literal["int8", "nf4"]
_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
_BITS = {"int8": 8, "nf4": 4}
_BLOCK = 64  # numbers with one scale in NormalFloats


def check_quantization(kind: str) -> None:
    """Refuse a kind that there is not, or whose package is not installed.

    Raises:
        UsageError: It is one of these.
    """
    if kind not in get_args(Quantization):
        raise UsageError(f"lora.quantize must be {' or '.join(get_args(Quantization))}, not {kind!r}")
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise UsageError(f"lora.quantize: {kind} needs {_PACKAGES[kind]}; pip install 'kvtrain[quantize]'")


def quantize(model: nn.Module, names: Iterable[str], kind: Quantization) -> None:
    """Quantise linear modules of a model in place, where their weights lie.

    Args:
        model: The model.
        names: Of the modules, which do not train.
        kind: How.

    Raises:
        UsageError: Rows of a weight are no multiple of what shares a scale.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        place = model.get_submodule(parent)
        width = getattr(place, last).in_features
        if kind == "nf4" and width % _BLOCK:  # scales are of runs of numbers, and bitsandbytes errs across rows on CPUs
            raise UsageError(f"lora.quantize: nf4 takes rows of a multiple of {_BLOCK} numbers, and {name} has {width}")
        setattr(place, last, _quantized(getattr(place, last), kind))


def _quantized(linear: nn.Linear, kind: Quantization) -> nn.Linear:
    if linear.weight.is_meta or isinstance(linear.weight.data, FakeTensor):
        return _StandIn(linear, _BITS[kind])
    return _in_8_bits(linear) if kind == "int8" else _in_4_bits(linear)


def _in_8_bits(linear: nn.Linear) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    linear.requires_grad_(False)
    return linear


def _in_4_bits(linear: nn.Linear) -> nn.Linear:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    with torch.device("meta"):
        small: nn.Linear = layers.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    weight = layers.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=small)
    small.weight, small.bias = weight.to(linear.weight.device), linear.bias  # which quantises
    return small


class _StandIn(nn.Linear):
    """Has the bytes of a quantised module, and takes those of its products; for estimates, which have no values."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed = torch.empty(linear.weight.numel() * bits // 8, dtype=torch.uint8, device=linear.weight.device)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """As many numbers, none of which means anything."""
        wide = torch.empty(self.out_features, self.in_features, dtype=hidden.dtype, device=hidden.device)
        return nn.functional.linear(hidden, wide, self.bias)
