"""The base of every training module: the step, the loss, the optimizer, the phases."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvtrain.data.packing import Batch
from kvtrain.errors import UsageError, require_seed
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.models.method import Repeat
from kvtrain.training.parameters import clear_moments, whole_shape
from kvtrain.training.schedules import Phase, PhaseStep, Schedule
from kvtrain.training.step_figures import StepFigures, Transform
from kvtrain.training.strategies.base import Tensors, traits


@dataclass(frozen=True)
class Cost:
    """What a module knows of its model's price before there is one.

    Attributes:
        described: What is special about the model, to stand behind its class.
        layers: Layers that a step runs, as a multiple of what a plain model runs.
        kv_bytes_before: A row in an ordinary cache of half precision.
        kv_bytes_after: A row in the cache that the model is served with.
    """

    described: str
    layers: float
    kv_bytes_before: int
    kv_bytes_after: int


def check_numbers(weight_decay: float, betas: tuple[float, float], seed: int) -> None:
    """Refuse what AdamW and the random numbers of a step cannot use.

    Raises:
        ValueError: A number is out of range.
    """
    require_seed("model.seed", seed)
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must not be negative, not {weight_decay}")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be from 0 to below 1, not {', '.join(map(str, betas))}")


class TrainingModule(pl.LightningModule, ABC):
    """Trains a language model on packed rows, phase by phase.

    Subclasses build the model and may add losses and what happens at a phase's start.

    Args:
        phases: Phases, in order; their sum bounds ``trainer.max_steps``.
        weight_decay: On matrices; vectors and embeddings have none.
        betas: Of AdamW.
        seed: Everything random in a step derives from it, the step and the row.
        activation_checkpointing: Recompute each layer in the backward pass.

    Raises:
        ValueError: A number is out of range, or there is no phase.
    """

    model: PreTrainedModel
    shares_teacher = True  # weights that stay with a teacher, where it may; no rank has them whole if they are sharded

    def __init__(
        self,
        phases: list[Phase],
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        seed: int = 0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_numbers(weight_decay, betas, seed)
        self.schedule = Schedule(phases)
        self.weight_decay, self.betas, self.seed = weight_decay, betas, seed
        self.activation_checkpointing = activation_checkpointing
        self.step_figures = StepFigures()
        self._last_step: int | None = None  # that the model has seen

    def setup(self, stage: str) -> None:
        """Let checkpoints be loaded that leave out what does not train."""
        self.strict_loading = self.frozen_base() is None

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """The model to train; called once, inside ``configure_model``."""

    @abstractmethod
    def build_meta_model(self) -> nn.Module:
        """The model on the meta device: shapes without memory.

        Raises:
            ValueError: The model's configuration cannot be had, or the method refuses it.
        """

    def pretrained_weights(self) -> Tensors | None:
        """Weights of the model by name, mapped from files, so that strategies can read parts of them.

        None where the model is made by ``build_model`` alone.

        Raises:
            ValueError: They cannot be had.
        """
        return None

    def vocab_size(self) -> int | None:
        """Tokens that the model knows, before there is one; None where that cannot be said."""
        return None

    @abstractmethod
    def cost(self, sequence_length: int) -> Cost:
        """What training and serving rows of so many tokens cost."""

    def require_context_parallel(self, ranks: int) -> None:
        """Make sure, before there is a model, that so many ranks can share its rows.

        Raises:
            UsageError: They cannot.
        """
        raise UsageError(f"{type(self).__name__} trains on whole rows alone; set context_parallel to 1")

    def repeats(self) -> list[Repeat]:
        """Which groups of layers cost the same, for estimates, which then rehearse a few of each."""
        return []

    def unlike_phases(self) -> list[int]:
        """Numbers of phases whose steps differ in what they hold, for estimates; mostly the first one tells of all."""
        return [0]

    def simplify(self, dropped: Collection[int]) -> None:
        """Before the model is built: let it be as an estimate rehearses it.

        Args:
            dropped: Layers that are left out, whole groups of ``repeats``.
        """
        assert not dropped, f"{type(self).__name__} names no layers that repeat"

    def configure_model(self) -> None:
        """Build the model, under whatever device and precision the strategy has set."""
        if hasattr(self, "model"):
            return
        self.model = traits(self._trainer).build_model(self).train()
        if self.activation_checkpointing:
            self.model.gradient_checkpointing_enable()

    def phase_step(self) -> PhaseStep:
        """Where the current optimizer step lies; while validating, the one whose batches the model saw last.

        A phase opens with its first batch: until then the model is still that of the phase before.
        """
        return self.schedule.phase_step(self._seen_step() if self.trainer.validating else self.global_step)

    def _seen_step(self) -> int:
        return max(0, self.global_step - 1) if self._last_step is None else self._last_step

    def model_arguments(self, batch: Batch) -> dict[str, Any]:
        """What the model gets beyond the tokens; subclasses add to it."""
        return {"document_ids": batch["document_ids"], "position_ids": batch["position_ids"]}

    def estimate_batch(self, batch: Batch) -> Batch:
        """A batch of packed rows as this module would get it, for estimates."""
        return batch

    def teacher_inputs(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """What of a training batch the model reads, and what it gets of a teacher: nothing without one."""
        return batch, {}

    def teacher_model(self) -> nn.Module | None:
        """The model that runs forward beside every training step; None without one."""
        return None

    def extra_loss(self, batch: Batch, arguments: dict[str, Any]) -> Tensor | None:
        """A loss beside the model's, as a mean over the batch's rows; None where there is none."""
        return None

    @property
    def micro_batches(self) -> int:
        """Batches of an optimizer step, over all ranks."""
        return int(self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch, scaled so that the sum over the optimizer window is the mean over its targets."""
        batch, kwargs = self.teacher_inputs(batch)
        arguments = {**self.model_arguments(batch), **kwargs}
        output = self.model(**_summed(batch), **arguments)
        loss: Tensor = output.loss * (self.micro_batches / batch["num_items"])
        extra = self.extra_loss(batch, arguments)
        if extra is not None:
            loss = loss + extra
        for name, part in {"loss": output.loss, **output.get("loss_parts", {})}.items():
            self.step_figures.add(name, part / batch["num_items"], prog_bar=name == "loss")
        self.log("learning_rate", self.schedule.learning_rate(self.global_step))
        if self._is_logged(batch_idx):
            self.step_figures.log(self)
        return loss

    def log_mean(self, name: str, mean: Tensor, *, transform: Transform | None = None, prog_bar: bool = False) -> None:
        """Log the mean of a figure over the micro-batches of an optimizer step, on all ranks; each says its own.

        What ``log`` is given in a training step is rank 0's last micro-batch alone: enough for what is the same in all.

        Args:
            name: Of the figure.
            mean: Over this micro-batch, ``()``.
            transform: What is logged of the mean over all; None logs the mean itself.
            prog_bar: Whether the progress bar shows it.
        """
        self.step_figures.add(name, mean / self.micro_batches, transform=transform, prog_bar=prog_bar)

    def _is_logged(self, batch_idx: int) -> bool:
        """Whether an optimizer step ends here whose figures are wanted; where they cost no reduction, all are."""
        trainer: Any = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.should_stop:
            return False
        every = trainer.log_every_n_steps if trainer.world_size > 1 else 1
        return bool(every) and (self.global_step + 1) % every == 0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log a step that is one of its own because the run was told to stop, as Lightning does."""
        if self.trainer.should_stop and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.step_figures.log(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum losses and targets of the held-out rows."""
        arguments = self.model_arguments(batch)
        output = self.model(**_summed(batch), skip_logits=True, **arguments)
        self.observe_validation(batch, arguments, output)
        self._validation_loss += output.loss.double()
        # Ranks that share rows each see all labels of theirs, and have the loss of a part.
        self._validation_targets += self.num_targets(batch).double() / traits(self._trainer).context_parallel

    def num_targets(self, batch: Batch) -> Tensor:
        """How many labels of a batch count."""
        return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def observe_validation(self, batch: Batch, arguments: dict[str, Any], output: Any) -> None:
        """Look at what a held-out batch left in the arguments and came to; subclasses collect figures of their own."""

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._validation_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._validation_targets = torch.zeros((), dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out loss and perplexity over all ranks."""
        sums = torch.stack([self._validation_loss, self._validation_targets])
        total, targets = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.log("val_loss", (total / targets).float())
        self.log("val_perplexity", (total / targets).exp().float(), prog_bar=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Open a phase at its first optimizer step."""
        self._last_step = self.global_step
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if first:
            self.step_figures.clear()
        if first and self.schedule.is_boundary(self.global_step):
            self.begin_phase(self.phase_step().phase)

    def begin_phase(self, phase: Phase) -> None:
        """Clear the optimizer's moments; subclasses do more."""
        clear_moments(self.trainer)

    def on_fit_start(self) -> None:
        """Check that the phases cover the run."""
        self.check_steps(self.trainer.max_steps)

    def check_model(self) -> None:
        """Make sure, before anything heavy is read, that there is a model of which training can make something.

        Raises:
            ValueError: There is none.
        """

    def check_steps(self, steps: int) -> None:
        """Make sure that the phases cover a run of so many steps.

        Raises:
            ValueError: ``trainer.max_steps`` is unset or beyond the phases.
        """
        total = self.schedule.total_steps
        if not 0 < steps <= total:
            raise ValueError(f"trainer.max_steps is {steps}, the phases have {total} steps; set it to {total} or less")

    def write_record(self, run: Path) -> None:
        """Put into a run folder, when training begins, what reports will want to know of the model."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know how far the model has come: a trainer that only validates restores no progress."""
        self._last_step = max(0, checkpoint["global_step"] - 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what ``kvtrain export`` needs, as JSON, so that checkpoints stay free of pickled objects."""
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer_name", None)
        config = self.model.config.to_json_string(use_diff=False)
        settings = {"config": json.loads(config), "tokenizer": tokenizer, "unfinished": self.export_warning()}
        if template := getattr(data, "chat_template", None):
            settings["chat_template"] = template
        if (stop := getattr(data, "stop_token_id", None)) is not None:
            settings["stop_token_id"] = stop
        if base := self.frozen_base():
            settings |= base
            learnt = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["state_dict"] = {
                name: tensor for name, tensor in checkpoint["state_dict"].items() if name in learnt
            }
        checkpoint[CHECKPOINT_KEY] = json.dumps(settings)

    def is_trainable(self, name: str) -> bool:
        """Whether the model's parameter of this name is learnt."""
        return True

    def frozen_base(self) -> dict[str, Any] | None:
        """The model whose weights stay as they are, so that checkpoints need not hold them; None where all train.

        Returns:
            What an export completes checkpoints from: its name as ``base``, and ``num_key_value_heads`` if converted.
        """
        return None

    def export_warning(self) -> str | None:
        """Why the model is not one to serve yet, with the remedy; None where it is."""
        return None

    def divide_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups of the model, as they are or in parts with an ``lr`` of their own, a factor."""
        return groups

    def group_rate(self, group: dict[str, Any]) -> Callable[[int], float]:
        """The learning rate of a parameter group, by the optimizer step: the schedule's."""
        return self.schedule.learning_rate

    def extra_param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups that are no part of the model."""
        return []

    def configure_optimizers(self) -> Any:
        """AdamW, and a learning rate that is a function of the step."""
        decayed, plain = split_parameters(self.model)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in (*self.divide_groups(groups), *self.extra_param_groups()) if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=self.betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [self.group_rate(group) for group in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _summed(batch: Batch) -> dict[str, Any]:
    """What the model gets of any batch: to sum its loss, without a cache."""
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "num_items_in_batch": 1,
        "use_cache": False,
    }


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay: matrices, and vectors with embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = len(whole_shape(parameter)) >= 2 and id(parameter) not in embeddings
            (decayed if matrix else plain).append(parameter)
    return decayed, plain
