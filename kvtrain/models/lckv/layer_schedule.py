"""The order in which layers run: once, or again and again where they read from above (section 2.2; appendix A)."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvtrain.models.compat import CACHE
from kvtrain.models.context import ForwardContext
from kvtrain.models.hosts.base import HostAdapter
from kvtrain.models.lckv.attention import KeyValue, LayerInputs, LayerOutputs
from kvtrain.models.lckv.config import LCKV
from kvtrain.models.lckv.kv_map import Stage
from kvtrain.models.recording import RecordedStates

Serve = Callable[["LayerSchedule", Tensor, dict[str, Any], ForwardContext], Tensor]
Shared = dict[int, KeyValue]  # keys and values of the new tokens, by owner

_NOTHING: KeyValue = (None, None)


class SharingLayer(nn.Module):
    """What a decoder layer learns: it hands out the keys and values that it makes, and may make nothing else.

    Mixed in before the host's class, whose parameters, names and forward pass stay. Keys and values go in and out
    as arguments and results, so that checkpointing and sharding see a layer like any other.
    """

    adapter: HostAdapter

    def forward(self, hidden_states: Tensor, *, inputs: LayerInputs, **kwargs: Any) -> tuple[Tensor | None, KeyValue]:
        """The host layer's output, and what the layer owns; the output is None where only that is wanted."""
        outputs = LayerOutputs()
        if inputs.key_value_only:
            norm = self.adapter.input_norm
            normed = hidden_states if norm is None else getattr(self, norm)(hidden_states)
            attention = getattr(self, self.adapter.attention)
            attention(normed, kwargs["position_embeddings"], inputs=inputs, outputs=outputs)
            return None, outputs.key_value
        output = super().forward(hidden_states, inputs=inputs, outputs=outputs, **kwargs)
        return output, outputs.key_value

    def __reduce__(self) -> tuple[Any, ...]:
        """No module has this class by its name, and pickle finds the host's."""
        return _empty_layer, type(self).__bases__[1:], vars(self)


@functools.cache
def _sharing_class(host_class: Any) -> type[nn.Module]:
    return type(f"Sharing{host_class.__name__}", (SharingLayer, host_class), {})


def _empty_layer(host_class: Any) -> Any:
    sharing = _sharing_class(host_class)
    return sharing.__new__(sharing)


def sharing_layer(layer: nn.Module, adapter: HostAdapter) -> nn.Module:
    """A layer with the parameters of ``layer``, one of the adapter's family, that hands out keys and values."""
    adopted: nn.Module = _empty_layer(type(layer))
    adopted.__setstate__({**vars(layer), "adapter": adapter})
    return adopted


class LayerSchedule(nn.ModuleList):
    """A host's list of layers, run by a map.

    The host runs ``for layer in layers[:n]``; the slice has one entry, and that runs everything.

    Args:
        layers: The host's layers, with their attention replaced.
        rotary: The host's rotary embedding, for positions besides those of the input.
        settings: The method.
        adapter: Of the host's family.
        serve: The serving form: this list, hidden states, a layer's arguments and the context to hidden states.
    """

    def __init__(
        self, layers: nn.ModuleList, rotary: nn.Module, settings: LCKV, adapter: HostAdapter, serve: "Serve"
    ) -> None:
        super().__init__(sharing_layer(layer, adapter) for layer in layers)
        self.settings, self.serve = settings, serve
        self.keys, self.values = settings.maps(len(layers))
        self.plan = self.keys.stages()
        self._rotary = (rotary,)  # in a tuple: it is the decoder's, not a second submodule

    def __getitem__(self, index: int | slice) -> Any:
        return [self.run] if isinstance(index, slice) else super().__getitem__(index)

    def angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(B, T, D)`` of positions ``(B, T)``."""
        angles: tuple[Tensor, Tensor] = self._rotary[0](hidden, positions)
        return angles

    def run(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """All layers over ``(B, T, hidden)``; arguments are those of a host's layer and what serving adds."""
        kwargs.pop(CACHE, None)
        context: ForwardContext = kwargs.pop("context")
        if context.cache is not None:
            return self.serve(self, hidden_states, kwargs, context)
        recorded = context.recorded
        shared: Shared = {}
        for stage in self.plan:
            if stage.cyclic:
                if recorded is not None:
                    recorded[stage.first] = hidden_states
                hidden_states = self._iterate(stage, hidden_states, shared, kwargs, context)
            else:
                hidden_states = self.run_stage(stage, hidden_states, shared, kwargs, recorded, **_given(context))
        return hidden_states

    def layer_repeats(self, sequence_length: int) -> Iterator[tuple[nn.Module, int, int]]:
        """Layers that a training step runs again; see ``RepeatsLayers``. A stage's last one only makes keys and values.

        Args:
            sequence_length: Tokens of a row.
        """
        again = min(self.settings.passes, sequence_length) - 1
        graded = min(self.settings.backward_passes - 1, again)
        for stage in self.plan:
            if stage.cyclic:
                yield from ((self[layer_idx], again, graded) for layer_idx in range(stage.first, stage.last))

    def _iterate(
        self, stage: Stage, hidden: Tensor, shared: Shared, kwargs: dict[str, Any], context: ForwardContext
    ) -> Tensor:
        """A cyclic stage from no keys and values: passes without gradient, with, and the last one's output.

        A pass makes one more token exact, so passes beyond the length change nothing and are left out.
        """
        passes = min(self.settings.passes, context.positions.shape[-1])
        for index in range(passes - 1):
            graded = index >= passes - self.settings.backward_passes
            with torch.set_grad_enabled(graded and torch.is_grad_enabled()):
                self.update_kv(stage, hidden, shared, kwargs, **_given(context))
        before = dict(shared)
        hidden = self.run_stage(stage, hidden, shared, kwargs, **_given(context))
        if self.settings.stale_target:
            shared.update({owner: before.get(owner, _NOTHING) for owner in self.targets(stage)})
        return hidden

    def update_kv(self, stage: Stage, hidden: Tensor, shared: Shared, kwargs: dict[str, Any], **given: Any) -> None:
        """A pass whose output nobody needs: the last layer makes its keys and values and stops."""
        hidden = self._pass(range(stage.first, stage.last), hidden, shared, kwargs, **given)
        self._pass([stage.last], hidden, shared, kwargs, key_value_only=True, **given)

    def run_stage(
        self,
        stage: Stage,
        hidden: Tensor,
        shared: Shared,
        kwargs: dict[str, Any],
        recorded: RecordedStates | None = None,
        **given: Any,
    ) -> Tensor:
        """A pass through all layers of a stage; ``given`` is what every ``LayerInputs`` says besides."""
        return self._pass(range(stage.first, stage.last + 1), hidden, shared, kwargs, recorded, **given)

    def _pass(
        self,
        layers: Iterable[int],
        hidden: Tensor,
        shared: Shared,
        kwargs: dict[str, Any],
        recorded: RecordedStates | None = None,
        **given: Any,
    ) -> Tensor:
        """Layers in order; ``shared`` gains what they make.

        A layer that reads from above finds there what the pass before has left.
        """
        before = dict(shared) if self.settings.stale_target else shared
        for layer_idx in layers:
            if recorded is not None:
                recorded[layer_idx] = hidden
            key_layer, value_layer = self.keys.sources[layer_idx], self.values.sources[layer_idx]
            stale = self.settings.stale_target and self._is_target(key_layer)
            source = before if stale else shared
            key, value = source.get(key_layer, _NOTHING)[0], source.get(value_layer, _NOTHING)[1]
            first = shared.get(0) if self.settings.residual else None
            inputs = LayerInputs(key, value, own=not stale, first=first, **given)
            output, owned = self._modules[str(layer_idx)](hidden, inputs=inputs, **kwargs)
            hidden = hidden if output is None else output
            if owned[0] is not None or owned[1] is not None:
                shared[layer_idx] = owned
        return hidden

    def targets(self, stage: Stage) -> list[int]:
        """Owners in a cyclic stage that layers below them read."""
        return [owner for owner in self.keys.owners if stage.first <= owner <= stage.last and self._is_target(owner)]

    def _is_target(self, owner: int) -> bool:
        return min(self.keys.readers(owner)) < owner


def _given(context: ForwardContext) -> dict[str, Any]:
    """What every ``LayerInputs`` of a pass without a cache says."""
    return {"documents": context.documents, "parallel": context.parallel}
