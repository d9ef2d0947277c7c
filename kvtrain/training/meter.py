"""Counts the bytes of tensors while operations run, moment by moment."""

import itertools
import weakref
from collections.abc import Collection, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

_ITEM, _NONZERO = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
_DEVICE = torch.ops.prim.device.default

START = "start"  # the first moment


class Reading(NamedTuple):
    """What the meter showed.

    Attributes:
        live: Bytes of all storages.
        gradients: Bytes of them that are gradients of parameters.
    """

    live: int
    gradients: int


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of every storage that operations bring into being, until it is freed.

    Args:
        condition: What a Boolean that depends on the values of fake tensors comes to.

    Attributes:
        live: Bytes held at present.
        gradients: Bytes of gradients among them, as far as somebody says so.
        peaks: Most that was held, by moments.
    """

    def __init__(self, condition: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.condition = condition
        self.live = self.gradients = 0
        self.peaks: dict[Hashable, Reading] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.begin(START)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under a meter; to guard every operation against it would take as long as the counting."""
        return False

    @property
    def peak(self) -> int:
        """Most bytes that were held."""
        return max(peak.live for peak in self.peaks.values())

    def begin(self, moment: Hashable) -> None:
        """Give what follows a name; what had that name before goes on."""
        self._moment = moment
        self.peaks.setdefault(moment, Reading(0, 0))
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # every second call
            return args[0].fake_device
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
            self._note()

    def count_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take note of each gradient as soon as it lies at its parameter; whoever clears them says so."""

        def arrived(parameter: Tensor) -> None:
            self.gradients += parameter.nbytes

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def _note(self) -> None:
        if self.live > self.peaks[self._moment].live:
            self.peaks[self._moment] = Reading(self.live, self.gradients)

    def _forget(self, address: int, size: int) -> None:
        del self._storages[address]
        self.live -= size


class LayerMarks:
    """Tells a meter which layer runs, forward, once more, or backward.

    Args:
        meter: Gets moments ``(stage, what, layer, which time)``.
        dropped: Layers that the model has lost; the others keep their numbers.
    """

    def __init__(self, meter: MemoryMeter, dropped: Collection[int]) -> None:
        self.meter, self.dropped = meter, dropped
        self._stage: Hashable = None
        self._times: dict[Hashable, int] = {}

    def open_stage(self, stage: Hashable) -> None:
        """Begin to count anew, under another name."""
        self._stage, self._times = stage, {}
        self.meter.begin(stage)

    def watch(self, model: nn.Module) -> None:
        """Follow the layers of a model."""
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        numbers = (number for number in itertools.count() if number not in self.dropped)
        for number, layer in zip(numbers, layers, strict=False):
            layer.register_forward_pre_hook(lambda *_, number=number: self._mark("in", number))
            layer.register_forward_hook(lambda _, __, outputs, number=number: self._leave(number, outputs))

    def _leave(self, number: int, outputs: Any) -> None:
        self._mark("out", number)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self._mark("back", number))

    def _mark(self, what: str, number: int) -> None:
        place = (self._stage, what, number)
        self._times[place] = self._times.get(place, 0) + 1
        self.meter.begin((*place, self._times[place]))
