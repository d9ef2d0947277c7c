"""What a run asks of its strategy, as one device and DDP answer it; strategies that shard answer otherwise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvtrain.errors import UsageError

Tensors = Mapping[str, Tensor]
SAME_STRATEGY = "go on with the trainer.strategy that the run was begun with"


class BuildsModel(Protocol):
    """What a strategy may ask of a training module before there is a model."""

    def build_model(self) -> PreTrainedModel:
        """The whole model, in memory."""

    def build_meta_model(self) -> nn.Module:
        """The model on the meta device."""

    def pretrained_weights(self) -> Tensors | None:
        """The model's weights by name, mapped from files; None where there are none before it is built."""

    def is_trainable(self, name: str) -> bool:
        """Whether the model's parameter of this name is learnt."""


class BuildsTeacher(Protocol):
    """What a strategy may ask of a training module with a second model beside its own."""

    def build_teacher(self) -> PreTrainedModel:
        """The whole teacher, on the device."""

    def build_meta_teacher(self) -> nn.Module:
        """The teacher on the meta device."""

    def teacher_weights(self) -> Tensors:
        """Its weights by name, mapped from files."""


class StrategyTraits:
    """What differs between strategies, mixed in before Lightning's class; here for parameters that each rank has whole.

    Attributes:
        drops_steps: Whether it looks at gradients by itself and drops a step whose gradient is not finite, after which
            ``step_applied`` tells; otherwise gradients can be read before the step.
        scaled_precisions: Under which losses are scaled, so that a gradient may overflow.
        context_parallel: Ranks that share their rows.
    """

    drops_steps = False
    scaled_precisions: tuple[str, ...] = ("16-mixed",)
    context_parallel = 1

    def build_model(self, module: BuildsModel) -> PreTrainedModel:
        """A training module's model; every rank calls it."""
        return module.build_model()

    def build_teacher(self, module: BuildsTeacher) -> PreTrainedModel:
        """A training module's second model, on the device; every rank calls it."""
        return module.build_teacher()

    def require_checkpoint(self, path: Path, fits: bool = True) -> None:
        """Make sure that a checkpoint, which is there and whole, is one to go on from.

        Args:
            path: The checkpoint.
            fits: Whether training goes on; otherwise weights alone are wanted.

        Raises:
            UsageError: It was written under another strategy.
        """
        if path.is_dir():
            raise UsageError(f"{path}: a folder, sharded by another strategy; {SAME_STRATEGY}")

    def parameter_sizes(self, model: nn.Module) -> list[tuple[int, bool]]:
        """Numbers of every whole parameter, and whether it trains."""
        return [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]

    def watch_overflow(self) -> None:
        """Turn on the check behind ``drops_steps``."""

    def step_applied(self) -> bool:
        """Whether the last optimizer step changed the weights."""
        return True

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """2-norm of all gradients before a step; every rank calls it. None where they cannot be read."""
        return global_norm(optimizer)

    def last_gradient_norm(self) -> Tensor | None:
        """2-norm of all gradients of the step just taken, where ``gradient_norm`` could not tell."""
        return None


def totals(sizes: Sequence[tuple[int, bool]]) -> tuple[int, int]:
    """Numbers of all parameters and of the trained ones, from ``StrategyTraits.parameter_sizes``."""
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


_PLAIN = StrategyTraits()


def traits(trainer: pl.Trainer | None) -> StrategyTraits:
    """What differs under a trainer's strategy; without one a module is by itself."""
    strategy: Any = getattr(trainer, "strategy", None)
    return strategy if isinstance(strategy, StrategyTraits) else _PLAIN


def global_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """2-norm of all gradients of an optimizer whose parameters are whole."""
    return torch.nn.utils.get_total_norm(gradients(optimizer))


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Gradients of an optimizer's parameters, where they have one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class PlainParameters:
    """Reads and writes parameters that lie whole on every rank; the base of those that do not.

    Attributes:
        mark: The attribute by which a parameter of this kind is known.
    """

    mark: ClassVar[str] = "numel"

    def shape(self, parameter: Any) -> torch.Size:
        """See ``parameters.whole_shape``."""
        shape: torch.Size = parameter.shape
        return shape

    def whole(self, parameter: Any) -> Tensor:
        """See ``parameters.whole``."""
        copy: Tensor = parameter.detach().clone()
        return copy

    def zero_rows(self, parameter: Any, rows: slice) -> None:
        """See ``parameters.zero_rows``."""
        parameter[rows] = 0

    def clamp(self, parameter: Any, low: float, high: float) -> None:
        """See ``parameters.clamp_parameter``."""
        parameter.clamp_(low, high)


def row_mask(parameter: Tensor, shape: torch.Size, rows: slice) -> Tensor:
    """True in some rows of a tensor of this shape, on a parameter's device."""
    mask = torch.zeros(shape, dtype=torch.bool, device=parameter.device)
    mask[rows] = True
    return mask
