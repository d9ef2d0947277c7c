"""What training needs in memory, found by rehearsing a step on tensors that have shapes and hold nothing.

The module's own step runs, forward and backward, custom autograd functions included; every storage is counted from
its birth to its death. Unseen stay what a kernel uses within itself and what an allocator wastes.
"""

import copy
import itertools
import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from kvtrain.data.packing import Batch
from kvtrain.training.base import TrainingModule
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
_ITEM, _NONZERO = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
# Longer rows are not rehearsed: memory grows evenly with a row's length, and two lengths tell how fast.
_LONG, _LENGTHS = 8192, (512, 1024)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one device that shards nothing.

    Attributes:
        parameters: Weights of the model, shared ones once.
        gradients: Of the trained ones.
        optimizer: Its state.
        teacher: A second model that does not train; 0 without one.
        activations: What the forward pass leaves for the backward pass, weights cast to half precision among it.
        peak: All of these, and the temporary tensors of the moment at which most is held.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    peak: int

    def at(self, length: int, longer: "TrainingMemory", lengths: tuple[int, int]) -> "TrainingMemory":
        """For rows of another length, from this and from ``longer``, which are those of two ``lengths``."""
        share = (length - lengths[0]) / (lengths[1] - lengths[0])
        pairs = zip(astuple(self), astuple(longer), strict=True)
        return TrainingMemory(*(round(low + share * (high - low)) for low, high in pairs))


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of every storage that operations bring into being, until it is freed.

    Args:
        condition: What a Boolean that depends on the values of fake tensors comes to.

    Attributes:
        live: Bytes held at present.
        peak: Most that were held.
    """

    def __init__(self, condition: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.condition = condition
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        try:
            outputs = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not _ITEM or args[0].dtype is not torch.bool:
                raise
            return self.condition
        except DynamicOutputShapeException:
            if func is not _NONZERO:
                raise
            # Such as the sinks before a chunk: nothing to speak of beside the tokens of its window.
            outputs = args[0].new_empty(0, args[0].dim(), dtype=torch.long)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._storages:
            self._storages[address] = weakref.ref(storage, lambda _: self._forget(address, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int) -> None:
        del self._storages[address]
        self.live -= size


class _Forgetful(FakeTensorConverter):
    """Notes no tensor down: a module cannot change the dtype of parameters that are referred to from elsewhere."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


def _without_values() -> FakeTensorMode:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _Forgetful()
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


def rehearse(
    module: TrainingModule,
    *,
    batch_size: int,
    sequence_length: int,
    precision: str = "32-true",
    accumulates: bool = False,
    on_cpu: bool = True,
) -> TrainingMemory:
    """Take a step of every phase, its optimiser's state and its gradients in place, as from the second step on.

    Rows of more than 8,192 tokens are not read: their memory follows from that of two shorter lengths.

    Args:
        module: The module, its model not yet built; stays as it is.
        batch_size: Rows.
        sequence_length: Tokens a row; rows hold several documents.
        precision: Long name.
        accumulates: Whether gradients of several batches are summed.
        on_cpu: Elsewhere AdamW updates all weights at a time.
    """
    if sequence_length > _LONG:
        settings: dict[str, Any] = {"precision": precision, "accumulates": accumulates, "on_cpu": on_cpu}
        short, long = (rehearse(module, batch_size=batch_size, sequence_length=n, **settings) for n in _LENGTHS)
        return short.at(sequence_length, long, _LENGTHS)
    meter, plugin, twin = MemoryMeter(condition=not on_cpu), _PLUGINS[precision], _twin(module)
    with _silence(), _without_values(), meter:
        with plugin.module_init_context():
            twin.configure_model()
        plugin.convert_module(twin)
        model = meter.live
        twin.on_fit_start()
        teacher = meter.live - model
        twin.on_train_start()
        optimizer = _warm_optimizer(twin, foreach=not on_cpu)
        batch = twin.rehearsal_batch(_batch(batch_size, sequence_length))
        activations = 0
        for step in _first_steps(twin):
            twin.trainer.global_step = step
            held = meter.live
            twin.on_train_batch_start(batch, 0)
            with plugin.train_step_context():
                loss = twin.training_step(batch, 0)
            activations = max(activations, meter.live - held)
            if not accumulates:
                optimizer.zero_grad()
            loss.backward()
            del loss
        return TrainingMemory(
            parameters=_bytes(twin.parameters()),
            gradients=_bytes(p for p in twin.parameters() if p.requires_grad),
            optimizer=_bytes(leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)),
            teacher=teacher,
            activations=activations,
            peak=meter.peak,
        )


def _twin(module: TrainingModule) -> Any:
    """A copy that needs neither a trainer nor weights."""
    twin: Any = copy.deepcopy(module)
    if isinstance(module, RetrofitModule):
        config, dtype = module.plain_config(), module.base_dtype
        twin._load_base = lambda: AutoModelForCausalLM.from_config(config, dtype=dtype)
    twin.log = lambda *_, **__: None
    # Without optimisers, so that a phase's start clears no moments: they are there again from its second step on.
    twin.trainer = SimpleNamespace(
        global_step=0,
        validating=False,
        max_steps=module.schedule.total_steps,
        accumulate_grad_batches=1,
        world_size=1,
        optimizers=[],
    )
    return twin


@contextmanager
def _silence() -> Iterator[None]:
    """A rehearsal's log lines would tell of a run that never was."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(level)


def _warm_optimizer(twin: Any, *, foreach: bool) -> torch.optim.Optimizer:
    """The optimiser after two steps, the second of which finds all gradients and moments in place."""
    optimizer: torch.optim.Optimizer = twin.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["foreach"] = foreach
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.step()
    return optimizer


def _batch(batch_size: int, sequence_length: int) -> Batch:
    """Rows of two documents."""
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    batch = {name: ids.clone() for name in ("input_ids", "position_ids", "labels")}
    documents = 1 + (torch.arange(sequence_length) >= sequence_length // 2).long()
    batch["document_ids"] = documents.expand(ids.shape).contiguous()
    return {**batch, "row_ids": torch.arange(batch_size), "num_items": torch.tensor(1.0)}


def _first_steps(module: TrainingModule) -> list[int]:
    """Global steps at which phases begin."""
    steps = (phase.steps for phase in module.schedule.phases)
    return [0, *itertools.accumulate(steps)][:-1]


def _bytes(tensors: Iterable[Tensor | nn.Parameter]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
