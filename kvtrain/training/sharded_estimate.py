"""What a rank holds where ranks divide a training between them, by strategy.

On top of the shares comes what is whole for a time: the layers at work, gradients on their way, the buckets in which
they travel, and what the optimizer needs beside the partition that it updates. DeepSpeed updates one flat partition a
parameter group; the counts of its copies were measured on its ZeRO-2 and ZeRO-3.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kvtrain.errors import UsageError, unknown
from kvtrain.training.base import split_parameters
from kvtrain.training.memory import TrainingMemory
from kvtrain.training.strategies import FSDP2, WORDS, DeepSpeedZeRO, read_config
from kvtrain.training.strategies.fsdp2 import require_layout

STRATEGIES = ("ddp", *WORDS)
_MASTER = 4  # bytes of a float32 number: masters, each moment, summed gradients
# DeepSpeed's own defaults, in elements.
_BUCKET, _LIVE, _GROUP = 500_000_000, 1_000_000_000, 1_000_000_000


class Division(NamedTuple):
    """How ranks divide a training between them.

    Attributes:
        strategy: One of ``STRATEGIES``; empty for one device.
        ranks: How many.
        zero: DeepSpeed's ``zero_optimization``; empty takes that of ``configs/deepspeed``.
        copies: Of the model under FSDP2, each divided by its part of the ranks.
        context_parallel: Ranks that share rows under FSDP2.
    """

    strategy: str = ""
    ranks: int = 1
    zero: Mapping[str, Any] = {}
    copies: int = 1
    context_parallel: int = 1

    @property
    def shards_weights(self) -> bool:
        """Whether no rank has weights whole."""
        return self.strategy in ("fsdp2", "zero3", "zero3_offload")


class Sizes(NamedTuple):
    """Numbers of elements.

    Attributes:
        parameters: All, shared ones once.
        trained: Those that train.
        layer: Of the largest layer.
        root: What lies in no layer: embeddings, the head, the last norm.
        group: Of the largest parameter group of the optimizer.
    """

    parameters: int
    trained: int
    layer: int
    root: int
    group: int

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Count; parameters that do not train are marked so."""
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        each = [sum(p.numel() for p in layer.parameters()) for layer in layers] or [0]
        total = sum(parameter.numel() for parameter in model.parameters())
        groups = [sum(p.numel() for p in group) for group in split_parameters(model)]
        return cls(total, sum(groups), max(each), total - sum(each), max(groups))


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        parameters: Its share of the weights.
        gradients: Its share of the summed gradients.
        optimizer: Its share of moments and, under DeepSpeed, of float32 masters.
        teacher: Its share of a second model.
        peak: The most that it holds at a time, on the device.
        offloaded: What of these lies in main memory instead.
        checkpoint: Of all ranks together, on disk.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    peak: int
    offloaded: int
    checkpoint: int


def strategy_of(trainer: Mapping[str, Any], ranks: int) -> Division:
    """The strategy of a recipe in a word, with what it says of the ranks.

    Args:
        trainer: The trainer's settings.
        ranks: How many run; one alone divides nothing.

    Raises:
        UsageError: DeepSpeed's configuration cannot be read.
    """
    asked = trainer.get("strategy")
    if isinstance(asked, Mapping):
        name, settings = str(asked.get("class_path", "")).rpartition(".")[2], asked.get("init_args", {})
        if name == DeepSpeedZeRO.__name__:
            return _of_zero(read_config(settings["config"])["zero_optimization"], ranks)
        if name == FSDP2.__name__:
            return Division(
                "fsdp2",
                ranks,
                copies=settings.get("data_parallel_replicate_size", 1),
                context_parallel=settings.get("context_parallel", 1),
            )
    if (word := str(asked).lower()) in STRATEGIES:  # as Lightning reads words
        return Division(word, ranks)
    return Division("ddp" if ranks > 1 else "", ranks)


def _of_zero(zero: dict[str, Any], ranks: int) -> Division:
    offloads = zero.get("offload_param", {}).get("device", "none") != "none"
    return Division("zero3_offload" if offloads else f"zero{zero['stage']}", ranks, zero)


def require_strategy(name: str) -> None:
    """Refuse what is no strategy of ours.

    Raises:
        UsageError: It is none.
    """
    if name not in STRATEGIES:
        raise UsageError(unknown("strategy", name, STRATEGIES, f"There are {', '.join(STRATEGIES)}"))


def rehearsed_precision(strategy: str, precision: str) -> str:
    """In which precision a model that is sharded computes: without autocast, which casts weights beside them."""
    sharded = strategy in STRATEGIES and strategy != "ddp"
    return precision.replace("-mixed", "-true") if sharded else precision


def rank_memory(
    memory: TrainingMemory,
    sizes: Sizes,
    division: Division,
    *,
    mixed: bool,
    on_cpu: bool,
    saved: int,
) -> RankMemory:
    """What a rank of several holds.

    Args:
        memory: Of the whole, measured in ``rehearsed_precision``.
        sizes: Of the model.
        division: How ranks divide the work.
        mixed: Whether float32 masters stand beside what computes.
        on_cpu: Whether AdamW keeps two temporary copies of what it updates, as on the CPU, or one.
        saved: Bytes of the weights that a module has saved; DeepSpeed saves them all.

    Raises:
        UsageError: Copies, or ranks that share rows, do not divide the ranks.
    """
    strategy, ranks, zero, copies, _ = division
    if strategy.startswith("zero"):
        zero = zero or read_config(f"configs/deepspeed/{strategy}.json")["zero_optimization"]
        return _deepspeed(memory, sizes, strategy, ranks, on_cpu, zero)
    if strategy == "fsdp2":
        require_layout(copies, division.context_parallel, ranks)
        return _fsdp2(memory, sizes, ranks // copies, mixed, on_cpu, saved)
    peak = memory.peak + memory.gradients  # buckets hold a second copy
    return RankMemory(
        memory.parameters, 2 * memory.gradients, memory.optimizer, memory.teacher, peak, 0, saved + memory.optimizer
    )


def _fsdp2(memory: TrainingMemory, sizes: Sizes, shards: int, mixed: bool, on_cpu: bool, saved: int) -> RankMemory:
    """Layers are gathered one ahead of the other, the root for the whole step; gradients travel in float32."""
    compute = memory.parameters / sizes.parameters  # bytes an element
    wider = _MASTER / compute if mixed else 1.0
    parameters, gradients, optimizer = (
        _share(wider * size, shards) for size in (memory.parameters, memory.gradients, memory.optimizer)
    )
    teacher = _share(memory.teacher, shards)
    lasting = parameters + optimizer + teacher
    gathered = compute * (sizes.root + 2 * sizes.layer)
    under_way = (compute + _MASTER) * max(sizes.layer, sizes.root) * (sizes.trained > 0)
    step = lasting + gathered + _with_gradients(memory, wider / shards, under_way)
    update = lasting + gradients + (2 * compute * wider * sizes.layer / shards if on_cpu else gradients)
    total = round(wider * (saved + memory.optimizer))
    return RankMemory(parameters, gradients, optimizer, teacher, round(max(step, update)), 0, total)


def _deepspeed(
    memory: TrainingMemory, sizes: Sizes, strategy: str, ranks: int, on_cpu: bool, zero: Mapping[str, Any]
) -> RankMemory:
    """Float32 masters in flat partitions; ZeRO-2 leaves the weights whole."""
    compute, stage3 = memory.parameters / sizes.parameters, strategy != "zero2"
    masters = _share(_MASTER * sizes.trained, ranks)
    parameters = _share(memory.parameters, ranks) if stage3 else memory.parameters
    gradients, optimizer = masters, 3 * masters
    teacher = _share(memory.teacher, ranks) if stage3 else memory.teacher
    bucket = int(zero.get("reduce_bucket_size", _BUCKET))
    bucket = min(bucket, sizes.trained) if on_cpu else bucket  # memory that nobody touches is none on the CPU
    buckets = (bucket if stage3 else 2 * bucket) * compute + (bucket * _MASTER if compute != _MASTER else 0)
    gathered = 0.0
    if stage3:
        live = min(int(zero.get("stage3_max_live_parameters", _LIVE)), sizes.parameters)
        gathered = compute * max(live, sizes.layer)
    offloaded = parameters + gradients + optimizer if strategy == "zero3_offload" and not on_cpu else 0
    lasting = parameters + gradients + optimizer + teacher - offloaded
    step = lasting + _others(memory) + gathered + buckets
    group = min(sizes.group, int(zero.get("sub_group_size", _GROUP)) if stage3 else sizes.group)
    # AdamW's copies, and the flat gradient; ZeRO-2 in half precision has summed into that very one.
    copies = (2 if on_cpu else 1) + (stage3 or compute == _MASTER)
    update = lasting + (0 if offloaded else copies * _share(_MASTER * group, ranks))
    total = memory.parameters + ranks * optimizer
    peak = round(max(step, update))
    return RankMemory(parameters, gradients, optimizer, teacher, peak, offloaded, total)


def _share(size: float, ranks: int) -> int:
    return -(-round(size) // ranks)


def _others(memory: TrainingMemory) -> int:
    """Most activations and temporary tensors of a step, without a teacher."""
    return max(held.others for moment, held in memory.moments.items() if _in_step(moment)) - memory.teacher


def _with_gradients(memory: TrainingMemory, share: float, under_way: float) -> float:
    """Most that is held for a step alone, without a teacher.

    Args:
        memory: Of the whole. Its forward pass finds the gradients of the step before, the backward pass clears them.
        share: Of the gradients that lie at their parameters.
        under_way: What comes beside them while they are computed.
    """
    most = 0.0
    for moment, held in memory.moments.items():
        if _in_step(moment):
            backward = "back" in moment or held.gradients < memory.gradients
            most = max(most, held.others + share * held.gradients + under_way * backward)
    return most - memory.teacher


def _in_step(moment: Hashable) -> TypeGuard[tuple[Any, ...]]:
    """Forward or backward: ``("step", phase)``, or what happens to a layer in it."""
    stage = moment[0] if isinstance(moment, tuple) and isinstance(moment[0], tuple) else moment
    return isinstance(stage, tuple) and stage[0] == "step"
