"""How a model's cache lies in an engine that keeps one table of blocks for all heads of a layer, as vLLM does.

Nothing here imports that engine: what it can hold, and what it cannot and why, is decided from settings alone. What is
special about a method stands in its folder, in ``vllm.py``; methods without that file are not served.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from kvtrain.models.config import KVTrainConfig
from kvtrain.models.discovery import exported_by_files
from kvtrain.models.hosts import host_adapter, key_value_shapes
from kvtrain.models.method import Method

# The reason of every method whose heads keep different tokens.
ONE_TABLE = "vLLM keeps one table of blocks for all of them"


@dataclass(frozen=True)
class Ring:
    """What heads keep that see a row's first tokens and its latest ones alone; it does not grow.

    Attributes:
        num_heads: Key-value heads.
        head_dim: Channels of each.
        sink: First tokens.
        recent: Latest tokens, the current one included.
    """

    num_heads: int
    head_dim: int
    sink: int
    recent: int


@dataclass(frozen=True)
class PagedLayer:
    """Where one layer's keys and values lie.

    Attributes:
        source: The layer whose blocks it reads; its own number where it fills them itself.
        num_paged_heads: Key-value heads that keep their tokens in blocks, the layer's first ones.
        window: Latest tokens that these heads see, the current one included; None: all.
        ring: What its other heads keep; None where there are no others.
    """

    source: int
    num_paged_heads: int
    window: int | None = None
    ring: Ring | None = None


@dataclass(frozen=True)
class PagedSupport:
    """What one folder of architectures answers.

    Attributes:
        settings: Of the methods, or the configuration of a model of our own.
        layers: From settings and the host's configuration, one answer a layer. A model of our own, asked with its
            configuration twice, answers with none: all that it keeps is of constant size. Raises ``ValueError`` with
            the remedy for what is not served.
    """

    settings: type[Any]
    layers: Callable[[Any, PreTrainedConfig], list[PagedLayer]]


def paged_layers(config: PreTrainedConfig) -> list[PagedLayer]:
    """Where the keys and values of each layer lie; none of a model of our own.

    Args:
        config: Of a retrofitted host, or of a model of our own.

    Raises:
        ValueError: It is not served; why, and what to do.
    """
    settings, host = (config.method, config.host_config) if isinstance(config, KVTrainConfig) else (config, config)
    if isinstance(config, KVTrainConfig) and host_adapter(host).attention_sinks:
        raise not_served(f"a host of type {host.model_type!r}", "learned attention sinks are not handed to its kernels")
    for support in exported_by_files("kvtrain.models", "vllm", "PAGED"):
        if isinstance(settings, support.settings):
            found: list[PagedLayer] = support.layers(settings, host)
            return found
    raise not_served(f"method {settings.name!r}" if isinstance(settings, Method) else f"{host.model_type!r}")


def whole_layers(host_config: PreTrainedConfig) -> list[PagedLayer]:
    """The plain host's layers: every head keeps every token."""
    return [PagedLayer(layer, heads) for layer, (heads, _) in enumerate(key_value_shapes(host_config))]


def not_served(what: str, reason: str = "") -> ValueError:
    """The error of what vLLM cannot hold, for its finder to raise.

    Args:
        what: Is not served.
        reason: Why, where there is more to say.
    """
    return ValueError(f"{what} is not served by vLLM{': ' * bool(reason)}{reason}; use kvtrain generate")
