"""Learning which heads need everything (DuoAttention, arXiv 2410.10819; PruLong, arXiv 2506.17121)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kvtrain.data.packing import Batch
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.losses.distillation import Distillation
from kvtrain.losses.gate_regularization import gate_size, sparsity_penalty
from kvtrain.models.context import LayerOutputs
from kvtrain.models.duo import Duo
from kvtrain.models.duo.attention import DuoStep
from kvtrain.models.duo.convert import gated_attention
from kvtrain.models.duo.gates import HEAD_GATES, choose_full_heads, open_probability, pattern_of
from kvtrain.training.callbacks.head_table import ByLayer, HeadTable
from kvtrain.training.parameters import clamp_parameter, whole
from kvtrain.training.retrofit import RetrofitModule
from kvtrain.training.strategies.base import traits
from kvtrain.training.teachers import teach

_RAMP_SHARE = 0.8  # of the steps, over which the sparsity aimed at rises (PruLong's code: 800 of 1,000)


class HeadGates(HeadTable):
    """Writes ``head_gates.csv``: every head's ``gate``, and ``full``, 1 where it would keep everything if rounded now.

    Args:
        run: Run folder.
        read_gates: Called on every rank; by layer its gates ``(H_kv,)``, and as they would be rounded now.
    """

    def __init__(self, run: Path, read_gates: Callable[[], Mapping[int, tuple[Tensor, Tensor]]]) -> None:
        super().__init__(run, HEAD_GATES)
        self._read_gates = read_gates

    def measure(self, trainer: pl.Trainer) -> ByLayer:
        """See ``HeadTable``."""
        return {layer: {"gate": gates, "full": full.long()} for layer, (gates, full) in self._read_gates().items()}


class DuoModule(RetrofitModule):
    """Learns one gate for every key-value head; everything else stays as it is, but for what ``lora`` adds.

    The teacher is the model itself with all gates open, so there is no second copy of it. Held-out figures are those
    of the rounded model. Checkpoints hold the gates alone, and exporting puts them into the base again.

    Args:
        base: Folder, Hub id, ``kvtrain:tiny`` or ``kvtrain:copy``.
        method: The window, the kind of gates, and the sparsity that is rounded to.
        distill: Come close to the model with open gates in the tokens that have labels: in the last hidden states
            (``true``), or as the settings of a ``Distillation`` say. ``false``: predict the next token (PruLong).
        regularization: Weight of the mean gate in the loss (released code: 0.05). Hard-concrete gates have a target
            instead, ``method.sparsity``, whose multipliers are learnt by ascent.
        multiplier_scale: Their learning rate, as a multiple of the gates'.
        betas: Of AdamW.
        **training: See ``RetrofitModule`` and ``TrainingModule``.
    """

    method: Duo

    def __init__(
        self,
        base: str,
        method: Duo | None = None,
        distill: Distillation | bool | None = True,
        regularization: float = 0.05,
        multiplier_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        **training: Any,
    ) -> None:
        distill = Distillation(of="hidden") if distill is True else distill
        super().__init__(base, method or Duo(), distill=distill, betas=betas, **training)
        if self.method.full_heads is not None:
            raise ValueError("full_heads is what training finds; leave it out of the recipe")
        if self.lora is not None and self.lora.train_also:
            raise ValueError("the model with open gates teaches, and its weights must stay; leave lora.train_also out")
        if regularization < 0:
            raise ValueError(f"regularization must not be negative, not {regularization}")
        self.regularization, self.multiplier_scale = regularization, multiplier_scale
        self._rounded: dict[int, Tensor] = {}
        if self.method.gates == "hard_concrete":
            self.multipliers = nn.Parameter(torch.zeros(2))

    @property
    def trains_base(self) -> bool:
        """See ``RetrofitModule``."""
        return False

    @property
    def teaches_itself(self) -> bool:
        """See ``RetrofitModule``."""
        return True

    def learns(self, name: str) -> bool:
        """See ``RetrofitModule``."""
        return name.endswith(".gates")

    def configure_callbacks(self) -> list[pl.Callback]:
        """Gates are written down at every validation."""
        return [HeadGates(Path(self.trainer.default_root_dir), self.head_gates)]

    def head_gates(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer its gates ``(H_kv,)``, and as they would be rounded now."""
        gated = gated_attention(self.model)
        stored = torch.stack([whole(module.gates) for module in gated]).float()
        gates = open_probability(stored) if self.method.gates == "hard_concrete" else stored.clamp(0.0, 1.0)
        rounded = pattern_of(choose_full_heads(gates, self.method.sparsity), gates.shape[1])
        return dict(
            zip((module.layer_idx for module in gated), zip(gates, rounded.to(gates), strict=True), strict=True)
        )

    def model_arguments(self, batch: Batch) -> dict[str, Any]:
        """While training the gates and where they are noted, otherwise the rounded ones."""
        arguments = super().model_arguments(batch)
        if self.trainer.validating or not self.model.training:
            return {**arguments, "step": DuoStep(gates=self._rounded)}
        return {**arguments, "step": self._step(), "outputs": LayerOutputs()}

    def _step(self, **kwargs: Any) -> DuoStep:
        return DuoStep(seed=self.seed, step=self.global_step, **kwargs)

    def teacher_model(self) -> nn.Module | None:
        """See ``TrainingModule``; the model itself."""
        return self.model if self.method.mixing == "teacher" or self.distillation is not None else None

    def teacher_inputs(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """What the model with open gates makes of the batch.

        Where its attention is mixed in, a student's answers depend on few of its tokens, and only those are read.
        """
        if self.teacher_model() is None:
            return batch, {}
        mixes = self.method.mixing == "teacher"
        seen = LayerOutputs() if mixes else None
        with self.as_base():
            teacher = teach(self.model, batch, step=DuoStep(full_attention=True), outputs=seen)
        kwargs: dict[str, Any] = {}
        if seen is not None:
            columns = self._columns(batch, len(seen))
            batch = {name: value[:, columns] if value.dim() == 2 else value for name, value in batch.items()}
            teacher = teacher._replace(hidden=teacher.hidden[:, columns])
            kwargs["step"] = self._step(teacher={layer: heads[:, :, columns] for layer, heads in seen.items()})
        if self.distillation is not None:
            kwargs["teacher"] = teacher
            kwargs["distillation"] = self.distillation
        return batch, kwargs

    def _columns(self, batch: Batch, layers: int) -> Tensor | slice:
        """What a student reads; all of it where ranks share rows, whose parts would be others than the teacher's."""
        shared = traits(self._trainer).context_parallel > 1
        return slice(None) if shared else receptive_field(batch, self.method, layers)

    def extra_loss(self, batch: Batch, arguments: dict[str, Any]) -> Tensor | None:
        """What pulls gates down."""
        outputs: LayerOutputs | None = arguments.get("outputs")
        if not outputs:
            return None
        used, stored = (torch.stack(gates) for gates in zip(*outputs.values(), strict=True))
        self.log_mean("mean_gate", used.mean(), prog_bar=True)
        if self.method.gates == "plain":
            return self.regularization * gate_size(stored)
        phase_step = self.phase_step()
        target = self.method.sparsity * min(1.0, (phase_step.step + 1) / (_RAMP_SHARE * phase_step.phase.steps))
        sparsity = 1.0 - open_probability(stored).mean()
        self.log_mean("sparsity", sparsity, prog_bar=True)
        self.log("sparsity_target", target)
        return sparsity_penalty(sparsity, target, self.multipliers)

    def extra_param_groups(self) -> list[dict[str, Any]]:
        """Multipliers climb where gates descend."""
        if self.method.gates == "plain":
            return []
        return [{"params": [self.multipliers], "weight_decay": 0.0, "maximize": True, "lr": self.multiplier_scale}]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Bring gates back between 0 and 1."""
        super().on_train_batch_start(batch, batch_idx)
        if self.method.gates == "plain" and batch_idx % self.trainer.accumulate_grad_batches == 0:
            for module in gated_attention(self.model):
                clamp_parameter(module.gates, 0.0, 1.0)

    def on_validation_epoch_start(self) -> None:
        """Round the gates, as an export would."""
        super().on_validation_epoch_start()
        self._rounded = {layer: rounded for layer, (_, rounded) in self.head_gates().items()}


def receptive_field(batch: Batch, settings: Duo, layers: int) -> Tensor | slice:
    """Columns of a batch on which a student's labelled tokens depend, where the far part is the teacher's.

    Every layer reaches ``recent - 1`` tokens back, and to the sinks, which depend on themselves alone. Rows of several
    documents are read whole, and so are all rows where a token stands for what the window has dropped.

    Args:
        batch: Labels and documents.
        settings: The window.
        layers: Of the model.
    """
    labelled = (batch["labels"] != IGNORE_INDEX).any(0).nonzero()
    documents = batch["document_ids"]
    if settings.compensation or not labelled.numel() or bool((documents != documents[:, :1]).any()):
        return slice(None)
    first, last = int(labelled[0]), int(labelled[-1]) + 1
    start = first - 1 - (settings.recent - 1) * layers
    if start <= settings.sink:
        return slice(last)
    tail = torch.arange(start, last, device=documents.device)
    return torch.cat([torch.arange(settings.sink, device=documents.device), tail])
