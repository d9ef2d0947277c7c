"""What training needs in memory, found by rehearsing a step on tensors that have shapes and hold nothing.

The module's own step runs, forward and backward, custom autograd functions included; every storage is counted from
its birth to its death. Unseen stay what a kernel uses within itself and what an allocator wastes.

The step runs as on a CPU, where operations work in slices so that nothing wide is held for long. The fused kernels of a
GPU hold nothing wide either, and so the figures stand for both.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from kvtrain.data.packing import Batch
from kvtrain.kernels import cpu_tiling
from kvtrain.models.method import Repeat
from kvtrain.training.base import TrainingModule
from kvtrain.training.memory import Held, TrainingMemory
from kvtrain.training.meter import START, LayerMarks, MemoryMeter, Reading
from kvtrain.training.retrofit import RetrofitModule

_PLUGINS: dict[str, Precision] = {
    "16-mixed": MixedPrecision("bf16-mixed", "cpu"),  # of the same sizes, and known to every device
    "bf16-mixed": MixedPrecision("bf16-mixed", "cpu"),
    "16-true": HalfPrecision("16-true"),
    "bf16-true": HalfPrecision("bf16-true"),
    "32-true": Precision(),
    "64-true": DoublePrecision(),
}
_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}
# Longer rows are not rehearsed: memory grows evenly with a row's length, and two lengths tell how fast.
_LONG, _LENGTHS = 8192, (2048, 4096)
_FEW = 5  # of layers alike: as many as are rehearsed in place of any more, two and then three


class _ConverterWithoutMemo(FakeTensorConverter):
    """Notes no tensor down: a module cannot change the dtype of parameters that are referred to from elsewhere."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


def _without_values() -> FakeTensorMode:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _ConverterWithoutMemo()
    return mode


def full_precision_name(precision: str | int | None) -> str:
    """Lightning's long name of a precision.

    Raises:
        ValueError: It is none whose memory can be told.
    """
    name = _ALIASES.get(str(precision), str(precision))
    if name not in _PLUGINS:
        raise ValueError(f"no estimate for precision {precision!r}; there are {', '.join(_PLUGINS)}")
    return name


def measure_step_memory(
    module: TrainingModule,
    *,
    batch_size: int,
    sequence_length: int,
    precision: str = "32-true",
    accumulates: bool = False,
    on_cpu: bool = True,
    every_layer: bool = False,
) -> TrainingMemory:
    """Take a step of every phase, its optimizer's state and its gradients in place, as from the second step on.

    Of phases that are alike one is rehearsed. Of layers that are alike the first and the last one are, and once more
    with another between them: what that one adds, all others add. Rows of more than 8,192 tokens are not read either:
    their memory follows from that of two shorter lengths.

    Args:
        module: The module, its model not yet built; stays as it is.
        batch_size: Rows.
        sequence_length: Tokens a row; rows hold several documents.
        precision: Long name.
        accumulates: Whether gradients of several batches are summed.
        on_cpu: Elsewhere AdamW updates all weights at a time.
        every_layer: Rehearse all phases, layers, and slices of operations that work in slices. That takes minutes
            where models are large; it is what the quick way has to agree with.
    """
    run = _Run(module, every_layer, batch_size, precision, accumulates, on_cpu)
    depths = [(1.0, frozenset[int]())] if every_layer else _depths(module.repeats())
    with contextlib.nullcontext() if every_layer else cpu_tiling.without_values():
        parts = [
            (weight * share, run.memory(length, dropped))
            for weight, length in _lengths(sequence_length)
            for share, dropped in depths
        ]
    return TrainingMemory.blend(parts)


def _depths(repeats: list[Repeat]) -> list[tuple[float, frozenset[int]]]:
    """Weights of shallower models, the shallowest one first, and the layers that each leaves out."""
    long = [units for units in repeats if len(units) > _FEW]
    dropped = frozenset(layer for units in long for unit in units[1:-1] for layer in unit)
    deeper = [(len(units) - 2.0, dropped - set(units[1])) for units in long]
    return [(1.0 - sum(weight for weight, _ in deeper), dropped), *deeper]


def _lengths(sequence_length: int) -> list[tuple[float, int]]:
    """Weights and lengths of the rows to rehearse."""
    if sequence_length <= _LONG:
        return [(1.0, sequence_length)]
    short, long = _LENGTHS
    weight = (sequence_length - short) / (long - short)
    return [(1.0 - weight, short), (weight, long)]


@dataclass(frozen=True)
class _Run:
    """Rehearsals of a module at several depths and lengths; attributes as the arguments of ``measure_step_memory``."""

    module: TrainingModule
    every_layer: bool
    batch_size: int
    precision: str
    accumulates: bool
    on_cpu: bool

    def memory(self, length: int, dropped: frozenset[int]) -> TrainingMemory:
        """With rows of ``length`` tokens, and a model without the ``dropped`` layers."""
        meter, detached = MemoryMeter(condition=not self.on_cpu), _detached_copy(self.module)
        if not self.every_layer:
            detached.simplify(dropped)
        phases = range(len(detached.schedule.phases)) if self.every_layer else detached.unlike_phases()
        marks = LayerMarks(meter, dropped)
        with _silence(), _without_values(), meter:
            teacher = self._build(detached, marks)
            optimizer = self._warm_optimizer(detached, marks)
            batch = detached.estimate_batch(_batch(self.batch_size, length))
            kept = tuple(self._step(detached, batch, optimizer, marks, phase) for phase in phases)
            parameters, gradients = _bytes(detached.parameters()), _bytes(_trained(detached))
            state = _bytes(leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))
        moments = {  # what is made before a model goes to its device is in main memory
            moment: _held(peak, parameters, 0 if moment == START else state)
            for moment, peak in meter.peaks.items()
            if self.on_cpu or moment != START
        }
        return TrainingMemory(parameters, gradients, state, teacher, kept, moments)

    def _build(self, detached: Any, marks: LayerMarks) -> int:
        """Model and teacher; returns the bytes of what the teacher alone has."""
        meter, plugin = marks.meter, _PLUGINS[self.precision]
        with plugin.module_init_context():
            detached.configure_model()
        plugin.convert_module(detached)
        detached.on_fit_start()
        detached.on_train_start()
        marks.watch(detached.model)
        if not self.accumulates:
            meter.count_gradients(_trained(detached))
        return _own_bytes(detached.teacher_model(), detached.model)

    def _warm_optimizer(self, detached: Any, marks: LayerMarks) -> torch.optim.Optimizer:
        """The optimizer after two steps, the second of which finds all gradients and moments in place."""
        optimizer: torch.optim.Optimizer = detached.configure_optimizers()["optimizer"]
        marks.open_stage("first update")
        for group in optimizer.param_groups:
            group["foreach"] = not self.on_cpu
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        marks.meter.gradients = _bytes(_trained(detached))
        optimizer.step()
        groups = optimizer.param_groups
        for index, group in enumerate(groups):  # each by itself: matrices grow with the depth, embeddings do not
            marks.open_stage(("update", index))
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        return optimizer

    def _step(
        self, detached: Any, batch: Batch, optimizer: torch.optim.Optimizer, marks: LayerMarks, phase: int
    ) -> int:
        """Forward and backward as a phase begins; returns what the one leaves for the other."""
        meter, held = marks.meter, marks.meter.live
        detached.trainer.global_step = sum(before.steps for before in detached.schedule.phases[:phase])
        marks.open_stage(("step", phase))
        detached.on_train_batch_start(batch, 0)
        with _PLUGINS[self.precision].train_step_context():
            loss = detached.training_step(batch, 0)
        kept = meter.live - held
        if not self.accumulates:
            optimizer.zero_grad()
            meter.gradients = 0
        loss.backward()
        return kept


def _held(peak: Reading, parameters: int, optimizer: int) -> Held:
    others = peak.live - parameters - peak.gradients - optimizer
    return Held(parameters, peak.gradients, optimizer, others)


def _own_bytes(teacher: nn.Module | None, model: nn.Module) -> int:
    """What a teacher holds that is not the model's, too."""
    if teacher is None:
        return 0
    shared = {id(tensor) for tensor in _tensors(model)}
    return _bytes({id(tensor): tensor for tensor in _tensors(teacher) if id(tensor) not in shared}.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _trained(detached: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in detached.parameters() if parameter.requires_grad]


def _detached_copy(module: TrainingModule) -> Any:
    """A copy that needs neither a trainer nor weights."""
    detached: Any = copy.deepcopy(module)
    if isinstance(module, RetrofitModule):
        detached._load_base = lambda: AutoModelForCausalLM.from_config(detached.plain_config(), dtype=module.base_dtype)
    detached.log = lambda *_, **__: None
    # Without optimizers, so that a phase's start clears no moments: they are there again from its second step on.
    detached.trainer = SimpleNamespace(
        global_step=0,
        validating=False,
        should_stop=False,
        max_steps=module.schedule.total_steps,
        accumulate_grad_batches=1,
        world_size=1,
        optimizers=[],
    )
    return detached


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A rehearsal's log lines and warnings would tell of a run that never was."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _batch(batch_size: int, sequence_length: int) -> Batch:
    """Rows of two documents."""
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    batch = {name: ids.clone() for name in ("input_ids", "position_ids", "labels")}
    documents = 1 + (torch.arange(sequence_length) >= sequence_length // 2).long()
    batch["document_ids"] = documents.expand(ids.shape).contiguous()
    return {**batch, "row_ids": torch.arange(batch_size), "num_items": torch.tensor(1.0)}


def _bytes(tensors: Iterable[Tensor | nn.Parameter]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
