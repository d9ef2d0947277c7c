"""What an architecture has to say for itself: one frozen dataclass with a few questions answered."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

Repeat = list[tuple[int, ...]]  # groups of layers that come again, alike and in order

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from kvtrain.cache.base import KVCacheLayer
    from kvtrain.cache.rows import Placement


def key_value_shape(host_config: "PreTrainedConfig") -> tuple[int, int]:
    """Key-value heads of a host, and the channels of each."""
    head_dim = getattr(host_config, "head_dim", None) or host_config.hidden_size // host_config.num_attention_heads
    return int(host_config.num_key_value_heads), int(head_dim)


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one way to shrink a key-value cache, and how to build it.

    Subclasses are frozen dataclasses in ``kvtrain/models/<name>/config.py``; they import torch modules
    inside their methods only, so that reading settings stays cheap.
    """

    name: ClassVar[str]

    @abstractmethod
    def attention(self, host_attention: "nn.Module", layer_idx: int) -> "nn.Module":
        """The module that takes the place of a host's attention, with the host's parameter names."""

    def cache_layer(self, layer_idx: int, host_config: "PreTrainedConfig", placement: "Placement") -> "KVCacheLayer":
        """An empty cache for one layer, whose tensors lie where ``placement`` says."""
        raise NotImplementedError(f"{type(self).__name__} builds its cache layers together")

    def cache_layers(
        self, host_config: "PreTrainedConfig", placements: "list[Placement]", **options: Any
    ) -> "list[KVCacheLayer]":
        """An empty cache layer for every layer; methods whose layers share something build them together.

        Args:
            host_config: The host's configuration.
            placements: Where the tensors of each layer lie.
            **options: Of ``make_cache``, for methods that have some.

        Raises:
            ValueError: An option that the method does not have.
        """
        if options:
            raise ValueError(f"caches of method {self.name!r} have no option {next(iter(options))!r}; leave it out")
        return [self.cache_layer(index, host_config, placement) for index, placement in enumerate(placements)]

    def stack(self, layers: "nn.ModuleList", rotary: "nn.Module") -> "nn.ModuleList":
        """Take the place of the host's list of layers; most methods leave it alone.

        Args:
            layers: The host's, with their attention replaced.
            rotary: The host's rotary embedding, for methods that need angles of their own.
        """
        return layers

    def runs_layers_once(self, host_config: "PreTrainedConfig") -> bool:
        """Whether a forward pass runs every layer once, so that hidden states between them can be recorded."""
        return True

    def recorded_states(self, host_config: "PreTrainedConfig") -> Sequence[int] | None:
        """Layers whose input has a single value, for methods whose stack records hidden states by itself.

        None leaves that to transformers, which sees every layer run once.
        """
        return None

    def training_cost(self, host_config: "PreTrainedConfig") -> float:
        """Layers that a training step runs, backward ones counted as two, as a multiple of the plain host's."""
        return 1.0

    def repeats(self, host_config: "PreTrainedConfig") -> list[Repeat]:
        """Which groups of layers cost the same: without one of them the model is a smaller one of the same make."""
        return [[(layer,) for layer in range(host_config.num_hidden_layers)]]

    def simplified(self, dropped: Collection[int], host_config: "PreTrainedConfig") -> Self:
        """Settings as an estimate rehearses them: what repeats and holds nothing new is done less often.

        Args:
            dropped: Layers that are left out, whole groups of ``repeats``.
            host_config: The host with all its layers.
        """
        return self

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """Whether layers hand over nothing with a gradient but hidden states; reentrant checkpointing sees no more."""
        return False

    @property
    def servable(self) -> bool:
        """Whether a model with these settings has a cache; without one it runs all the same."""
        return True

    def assisted_options(self) -> dict[str, Any] | None:
        """Options of ``make_cache`` under which it takes tokens back, for assisted decoding; None where none does."""
        return None

    def as_served(self, host_config: "PreTrainedConfig") -> "Method":
        """Settings of a model that these train, as far as they decide its cache's size."""
        return self

    def binarize(self, model: "PreTrainedModel", sparsity: float | None = None, **options: Any) -> None:
        """Round a model's gates in place, for methods that have gates.

        Args:
            model: The model.
            sparsity: Share of heads that stream; the method's own where absent.
            **options: The method's own.

        Raises:
            ValueError: The method has none.
        """
        raise ValueError(f"method {self.name!r} has no gates to round; kvtrain.Duo() has")

    def adapt_state(self, state: "dict[str, Tensor]", host_config: "PreTrainedConfig") -> "dict[str, Tensor]":
        """A host's weights by name as the retrofitted model wants them; most methods keep all."""
        return state

    def deploy(self, model: "PreTrainedModel") -> None:
        """Turn a trained model into the one that is served, in place, before it is exported; most have nothing to do.

        Raises:
            ValueError: It cannot be served as it is.
        """

    def validate(self, host_config: "PreTrainedConfig") -> None:
        """Refuse a host that this method cannot serve.

        Raises:
            ValueError: With the remedy.
        """

    def to_dict(self) -> dict[str, Any]:
        """Settings as they are stored in ``config.json``."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: A field is unknown, most likely because a newer kvtrain wrote the file.
        """
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in settings.items() if key != "name"}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"method {cls.name!r} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}. "
                "A newer kvtrain may have written this checkpoint: update kvtrain"
            )
        return cls(**values)
