"""How a retrofitted model's modules and caches are made: one ``Builder`` a method, in ``build.py`` of its folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models.method import Method

Settings = TypeVar("Settings", bound=Method)


class Builder(ABC, Generic[Settings]):
    """Makes modules and caches from settings; holds nothing else.

    Args:
        settings: The method's.
        host_config: The host's configuration.

    Attributes:
        model_functions: What a model with this method can do besides: functions of the model, which gets them as
            methods by these names.
    """

    model_functions: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    def __init__(self, settings: Settings, host_config: PreTrainedConfig) -> None:
        self.settings, self.host_config = settings, host_config

    @abstractmethod
    def attention(self, host_attention: nn.Module, layer_idx: int) -> nn.Module:
        """The module that takes the place of a host's attention, with the host's parameter names."""

    def layers(self, layers: nn.ModuleList, rotary: nn.Module) -> nn.ModuleList:
        """Take the place of the host's list of layers; most methods leave it alone.

        Args:
            layers: The host's, with their attention replaced.
            rotary: The host's rotary embedding, for methods that need angles of their own.
        """
        return layers

    def cache_layer(self, layer_idx: int, placement: Placement) -> KVCacheLayer:
        """An empty cache for one layer, whose tensors lie where ``placement`` says."""
        raise NotImplementedError(f"{type(self).__module__} makes its cache layers together")

    def cache_layers(
        self, placements: Mapping[int, Placement], page_size: int | None = None, **options: Any
    ) -> dict[int, KVCacheLayer]:
        """Empty cache layers, by layer; methods whose layers share something make them together.

        Args:
            placements: Of the method's layers, where the tensors of each lie: of all that it makes attention for.
            page_size: Slots in a page; those of the settings where absent.
            **options: Of ``make_cache``, for methods that have some.

        Raises:
            ValueError: An option that the method does not have, or a page without a slot.
        """
        self.refuse_options(options)
        sized = self.with_page_size(page_size)
        return {layer: sized.cache_layer(layer, placement) for layer, placement in placements.items()}

    def with_page_size(self, page_size: int | None) -> Self:
        """The same with another ``page_size`` in its settings, for caches; None changes nothing.

        Raises:
            ValueError: The settings have none, or refuse this one.
        """
        if page_size is None:
            return self
        if not hasattr(self.settings, "page_size"):
            self.refuse_options({"page_size": page_size})
        return type(self)(replace(cast("Any", self.settings), page_size=page_size), self.host_config)

    def refuse_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options of ``make_cache`` that are left when a method has taken its own.

        Raises:
            ValueError: There is one.
        """
        if options:
            name = self.settings.name
            raise ValueError(f"caches of method {name!r} have no option {next(iter(options))!r}; leave it out")

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A host's weights by name as the retrofitted model wants them; most methods keep all.

        Weights may be mapped from files in a narrower type than the model's: what is computed of them is given back in
        at least float32, and is cast to the model's type by whoever asks; what is left alone is the very tensor.
        """
        return state

    def deploy(self, weights: Mapping[str, Tensor]) -> tuple[Settings, Mapping[str, Tensor]]:
        """From a trained model to the one that is served, before it is exported; most serve what they train.

        Args:
            weights: Of the trained model by name, each read, whole, when it is asked for: no model is in memory.

        Returns:
            Settings of the model that is served, and its weights, to be read likewise.

        Raises:
            ValueError: It cannot be served as it is.
        """
        return self.settings, weights
