"""Floating-point operations of a training step, counted from the model, and what a device can do in a second.

Counted are the matrix products of every ``nn.Linear``, the head among them, of routers, of the experts that a token
takes, and of attention. Norms, activations, the optimizer, a method's own bookkeeping and what a fused kernel computes
twice are not. Attention is causal: of a row's T x T products half count, and borders of packed documents are not looked
at.

Torch's ``FlopCounterMode`` is what tests hold these sums against, and not what a run asks: it counts nothing in a
kernel that it has no formula for, which most of a GPU's are, and an estimate's step works on two of many slices.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_TERA = 10**12


@runtime_checkable
class MixesTokens(Protocol):
    """A module that does more for a token than its linear layers: attention of any kind."""

    def mixing_flops(self, sequence_length: int) -> int:
        """Operations of one token, forward, in a row of so many tokens; linear layers not counted."""


@runtime_checkable
class HasOtherWeights(Protocol):
    """A module that multiplies by weights which are in no ``nn.Linear``, such as a router's and those of experts."""

    def weight_flops(self) -> Mapping[nn.Parameter, int]:
        """Operations of one token with each of these weights, forward."""


@runtime_checkable
class RepeatsLayers(Protocol):
    """A stack that runs layers several times in a training step."""

    def layer_repeats(self, sequence_length: int) -> Iterable[tuple[nn.Module, int, int]]:
        """Layers, how often each runs beside the once that all do, and in how many of these runs backward as well."""


class TrainingFlops(NamedTuple):
    """Operations of one token, forward and backward.

    Attributes:
        model: What training cannot do without; layers that run several times count once (MFU).
        hardware: What is done: recomputed layers, each run of a layer and a teacher's forward pass count too (HFU).
    """

    model: int
    hardware: int


def training_flops(model: nn.Module, sequence_length: int, *, teacher: nn.Module | None = None) -> TrainingFlops:
    """Count what training costs for one token.

    Args:
        model: What trains, under any strategy.
        sequence_length: Tokens a row.
        teacher: Runs forward beside it, maybe the model itself.
    """
    needed = _forward(model, sequence_length) + _backward(model, sequence_length)
    done = needed + sum(_forward(layer, sequence_length) for layer in model.modules() if _is_recomputed(layer))
    for stack in model.modules():
        if isinstance(stack, RepeatsLayers):
            for layer, forward, backward in stack.layer_repeats(sequence_length):
                forward += backward if _is_recomputed(layer) else 0
                done += forward * _forward(layer, sequence_length) + backward * _backward(layer, sequence_length)
    return TrainingFlops(needed, done if teacher is None else done + _forward(teacher, sequence_length))


def _forward(module: nn.Module, sequence_length: int) -> int:
    return sum(_own_forward(part, sequence_length) for part in module.modules())


def _backward(module: nn.Module, sequence_length: int) -> int:
    return sum(_own_backward(part, sequence_length) for part in module.modules())


def _own_forward(module: nn.Module, sequence_length: int) -> int:
    """Of a module by itself, without its children."""
    if isinstance(module, nn.Linear):  # the features, because under ZeRO-3 a weight's own shape is no guide
        return 2 * module.in_features * module.out_features
    if isinstance(module, HasOtherWeights):
        return sum(module.weight_flops().values())
    return module.mixing_flops(sequence_length) if isinstance(module, MixesTokens) else 0


def _own_backward(module: nn.Module, sequence_length: int) -> int:
    """Each factor's gradient costs what the product costs; a frozen weight has none."""
    if isinstance(module, HasOtherWeights):
        return sum((2 if weight.requires_grad else 1) * flops for weight, flops in module.weight_flops().items())
    frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
    return (1 if frozen else 2) * _own_forward(module, sequence_length)


def _is_recomputed(layer: nn.Module) -> bool:
    return isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing


class Peak(NamedTuple):
    """Dense FLOP/s of one device, from its maker's data sheet, without sparsity.

    Attributes:
        half: bfloat16 and float16, summed in float32.
        tf32: float32 numbers through the tensor cores.
        single: float32 proper.
    """

    half: float
    tf32: float
    single: float


_H100_SXM = Peak(989.4 * _TERA, 494.7 * _TERA, 66.9 * _TERA)
_A100 = Peak(312 * _TERA, 156 * _TERA, 19.5 * _TERA)
# By the whole name: a slice, a laptop's or a trimmed version of a device carries a longer one.
_PEAKS = {
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 NVL": Peak(835 * _TERA, 417.5 * _TERA, 60 * _TERA),
    "NVIDIA H100 PCIe": Peak(756 * _TERA, 378 * _TERA, 51 * _TERA),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L40S": Peak(362 * _TERA, 183 * _TERA, 91.6 * _TERA),
    "NVIDIA L4": Peak(121 * _TERA, 60 * _TERA, 30.3 * _TERA),
    "NVIDIA A40": Peak(149.7 * _TERA, 74.8 * _TERA, 37.4 * _TERA),
    "NVIDIA A10": Peak(125 * _TERA, 62.5 * _TERA, 31.2 * _TERA),
    "NVIDIA RTX A6000": Peak(154.8 * _TERA, 77.4 * _TERA, 38.7 * _TERA),
    "NVIDIA GeForce RTX 4090": Peak(165.2 * _TERA, 82.6 * _TERA, 82.6 * _TERA),
    "NVIDIA GeForce RTX 3090": Peak(71 * _TERA, 35.6 * _TERA, 35.6 * _TERA),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of a device in the precision that a trainer multiplies in; None where they are not known.

    Args:
        device: Where the model trains.
        precision: Lightning's name of it, such as ``bf16-mixed``.
    """
    if device.type != "cuda":
        return None
    peak = _PEAKS.get(torch.cuda.get_device_name(device))
    if peak is None or precision.startswith(("64", "transformer-engine")):  # 8-bit products have no agreed peak
        return None
    if precision.startswith(("bf16", "16")):
        return peak.half
    return peak.single if torch.get_float32_matmul_precision() == "highest" else peak.tf32
