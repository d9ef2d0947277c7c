"""What a recipe will cost, worked out without allocating a weight."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from kvtrain.training.base import TrainingModule
from kvtrain.training.memory import TrainingMemory
from kvtrain.training.memory_estimate import full_precision_name, measure_step_memory
from kvtrain.training.sharded_estimate import (
    Division,
    RankMemory,
    Sizes,
    rank_memory,
    rehearsed_precision,
    require_strategy,
    strategy_of,
)
from kvtrain.training.strategies.base import totals, traits
from kvtrain.training.strategies.fsdp2 import require_context_parallel


@dataclass(frozen=True)
class Estimate:
    """What one device holds while it trains, and what serving holds for a row.

    Attributes:
        model: Class of the host and the method in it.
        parameters: Exact count, shared ones once.
        trainable: Those that train.
        parameter_bytes: Weights as they are stored.
        gradient_bytes: Gradients of the trained ones.
        optimizer_bytes: AdamW's state.
        teacher_bytes: The second model of a distillation.
        activation_bytes: What one batch's forward pass keeps for its backward pass.
        temporary_bytes: What else exists when most is held, such as a chunk of logits.
        peak_bytes: The sum of the six, in tensors; what allocators waste comes on top.
        training_cost: Layers that a step runs, as a multiple of the plain host's; the bytes above know of it.
        kv_bytes_before: A row of ``sequence_length`` tokens in an ordinary cache of half precision; 0 without a cache.
        kv_bytes_after: The same row in the method's cache, pages and open segments included, where it compresses as
            much as it aims at.
        batch_size: Rows a device.
        sequence_length: Tokens a row.
        precision: Of the trainer.
        activation_checkpointing: Whether layers are recomputed.
        checkpoint_bytes: A checkpoint on disk, of all ranks together.
        strategy: How ranks divide the work; empty for one device. The bytes above are those of one rank.
        ranks: How many.
        offloaded_bytes: What of them lies in main memory.
        context_parallel: Ranks that share rows; each holds its part of the tokens. What all of them hold whole,
            rotary angles and the decisions of heads, is left out.
    """

    model: str
    parameters: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    activation_bytes: int
    temporary_bytes: int
    peak_bytes: int
    training_cost: float
    kv_bytes_before: int
    kv_bytes_after: int
    batch_size: int
    sequence_length: int
    precision: str
    activation_checkpointing: bool
    checkpoint_bytes: int
    strategy: str = ""
    ranks: int = 1
    offloaded_bytes: int = 0
    context_parallel: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def estimate(
    module: TrainingModule,
    *,
    batch_size: int,
    sequence_length: int,
    precision: str | int | None,
    accelerator: str = "auto",
    accumulate: int = 1,
    division: Division | None = None,
) -> Estimate:
    """Work out the cost of a training module, of one device or of one rank of several.

    Args:
        module: The module, its model not yet built.
        batch_size: Rows a device.
        sequence_length: Tokens a row.
        precision: Lightning's name of it; None is ``32-true``.
        accelerator: Lightning's name of it.
        accumulate: Batches whose gradients are summed.
        division: How ranks divide the work; None: one device does all of it.

    Raises:
        ValueError: The host's configuration cannot be had, the method refuses it, or the precision is unknown.
    """
    module.check_model()
    name, model = full_precision_name(precision), module.build_meta_model()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(module.is_trainable(parameter_name))
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    division = division or Division()
    shared = division.context_parallel
    if shared > 1:
        require_context_parallel(module, sequence_length, shared)
    module.shares_teacher = not division.shards_weights
    memory = measure_step_memory(
        module,
        batch_size=batch_size,
        sequence_length=sequence_length // shared,
        precision=rehearsed_precision(division.strategy, name),
        accumulates=accumulate > 1,
        on_cpu=on_cpu,
    )
    saved = memory.parameters if module.frozen_base() is None else memory.gradients
    shape = {"batch_size": batch_size, "sequence_length": sequence_length, "precision": name}
    whole = _of_all(module, model, memory, saved, shape)
    if not division.strategy:
        return whole
    mixed = name.endswith("-mixed")
    rank = rank_memory(memory, Sizes.of(model), division, mixed=mixed, on_cpu=on_cpu, saved=saved)
    return _of_rank(whole, rank, division)


def _of_all(
    module: TrainingModule, model: nn.Module, memory: TrainingMemory, saved: int, shape: dict[str, Any]
) -> Estimate:
    """What one device holds that does all of it."""
    cost, (total, trainable) = module.cost(shape["sequence_length"]), count_parameters(model)
    return Estimate(
        model=f"{type(model).__name__} {cost.described}",
        parameters=total,
        trainable=trainable,
        parameter_bytes=memory.parameters,
        gradient_bytes=memory.gradients,
        optimizer_bytes=memory.optimizer,
        teacher_bytes=memory.teacher,
        activation_bytes=memory.activations,
        temporary_bytes=memory.temporary,
        peak_bytes=memory.peak,
        training_cost=cost.layers,
        kv_bytes_before=cost.kv_bytes_before,
        kv_bytes_after=cost.kv_bytes_after,
        activation_checkpointing=module.activation_checkpointing,
        checkpoint_bytes=saved + memory.optimizer,
        **shape,
    )


def _of_rank(whole: Estimate, rank: RankMemory, division: Division) -> Estimate:
    """What one rank holds."""
    on_device = rank.parameters + rank.gradients + rank.optimizer + rank.teacher - rank.offloaded
    return replace(
        whole,
        parameter_bytes=rank.parameters,
        gradient_bytes=rank.gradients,
        optimizer_bytes=rank.optimizer,
        teacher_bytes=rank.teacher,
        temporary_bytes=rank.peak - on_device - whole.activation_bytes,
        peak_bytes=rank.peak,
        checkpoint_bytes=rank.checkpoint,
        strategy=division.strategy,
        ranks=division.ranks,
        offloaded_bytes=rank.offloaded,
        context_parallel=division.context_parallel,
    )


def estimate_recipe(
    module: TrainingModule, data: Any, trainer: dict[str, Any], *, strategy: str | None = None, ranks: int | None = None
) -> Estimate:
    """Work out the cost of a recipe as it was read.

    Args:
        module: Its training module.
        data: Its data module.
        trainer: Its trainer's settings.
        strategy: In place of the recipe's.
        ranks: How many divide the work; None and no strategy: one device does all of it.

    Raises:
        ValueError: As ``estimate`` does, or there is no such strategy.
    """
    return estimate(
        module,
        batch_size=getattr(data, "batch_size", 1),
        sequence_length=getattr(data, "sequence_length", 1),
        precision=trainer.get("precision"),
        accelerator=trainer.get("accelerator") or "auto",
        accumulate=trainer.get("accumulate_grad_batches") or 1,
        division=_division(trainer, strategy, ranks),
    )


def _division(trainer: dict[str, Any], strategy: str | None, ranks: int | None) -> Division | None:
    if strategy is None and ranks is None:
        return None
    own = strategy_of(trainer, ranks or 1)
    if strategy is None:
        return own
    require_strategy(strategy)
    return Division(strategy, own.ranks, own.zero if own.strategy == strategy else {})


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones, each shared one counted once."""
    return totals(traits(None).parameter_sizes(model))


def table_rows(figures: Estimate) -> list[tuple[str, str]]:
    """The lines that ``kvtrain estimate`` prints."""
    checkpointed = ", checkpointed" if figures.activation_checkpointing else ""
    shared = figures.context_parallel
    part = "" if shared == 1 else f"1/{shared} of "
    shape = f"{part}{figures.batch_size} x {figures.sequence_length:,} tokens{checkpointed}"
    teacher = [("teacher", readable(figures.teacher_bytes))] if figures.teacher_bytes else []
    cost = [("layers run in a step", f"{figures.training_cost:.2f}x")] if figures.training_cost != 1 else []
    return [
        ("model", figures.model),
        ("parameters", f"{figures.parameters:,}"),
        ("trainable", f"{figures.trainable:,}"),
        *([("strategy", f"{figures.strategy}, {figures.ranks} ranks")] if figures.strategy else []),
        (f"weights ({figures.precision})", readable(figures.parameter_bytes)),
        ("gradients", readable(figures.gradient_bytes)),
        ("optimizer (AdamW)", readable(figures.optimizer_bytes)),
        *teacher,
        (f"activations ({shape})", readable(figures.activation_bytes)),
        ("temporary tensors", readable(figures.temporary_bytes)),
        ("peak, all tensors", readable(figures.peak_bytes)),
        *([("beside it, in main memory", readable(figures.offloaded_bytes))] if figures.offloaded_bytes else []),
        *cost,
        *_cache_rows(figures),
    ]


def _cache_rows(figures: Estimate) -> list[tuple[str, str]]:
    """Of models that have a cache."""
    if not figures.kv_bytes_after:
        return []
    name, less = f"KV cache of {figures.sequence_length:,} tokens", figures.kv_bytes_before / figures.kv_bytes_after
    return [
        (f"{name}, before", _served(figures, figures.kv_bytes_before)),
        (f"{name}, after", _served(figures, figures.kv_bytes_after, f", {less:.2f}x less")),
    ]


def _served(figures: Estimate, kv_bytes: int, remark: str = "") -> str:
    return f"{readable(kv_bytes)} ({kv_bytes / figures.sequence_length:,.0f} B a token{remark})"


def readable(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
