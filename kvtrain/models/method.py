"""What an architecture has to say for itself: one frozen dataclass with a few questions answered."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import nn
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

    @abstractmethod
    def cache_layer(self, layer_idx: int, host_config: "PreTrainedConfig", placement: "Placement") -> "KVCacheLayer":
        """An empty cache for one layer, whose tensors lie where ``placement`` says."""

    def stack(self, layers: "nn.ModuleList") -> "nn.ModuleList":
        """Take the place of the host's list of layers; most methods leave it alone."""
        return layers

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
