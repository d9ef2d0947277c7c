"""Settings of hybrids of softmax and linear attention."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

from transformers import PreTrainedConfig

from kvtrain.models.hosts import key_value_shapes, whole_layers, windows
from kvtrain.models.method import Method, Repeat

Features = Literal["none", "elu"]
Decay = Literal["lightning", "none"]


@dataclass(frozen=True)
class Hybrid(Method):
    """Let some layers attend linearly, over a state of constant size, and the others by softmax, over all tokens.

    A linear layer has the host's projections and rotary embedding, no denominator, a norm for every head in its place
    (NormAttention, arXiv 2210.10340), and decay (Lightning Attention, arXiv 2401.04658). Every query head has a state
    of its own: where heads share keys and values in the host, these are repeated (HALO, arXiv 2601.22156).

    Args:
        linear_layers: Which layers are linear, counted from 0, or ``"half"``: of the layers that see everything every
            second one, the first among them. Layers that slide in the host stay as they are.
        features: What becomes of queries and keys before they are rotated: nothing (``"none"``), or ``1 + elu``
            (``"elu"``, TransNormer's).
        decay: Past tokens fade by a constant factor a token, which differs from head to head (``"lightning"``), or do
            not (``"none"``).
        gate: A sigmoid of the layer's input multiplies what a head gives, channel by channel.
        norm_eps: Added to the mean square that a head is normed by. What a head gives may be next to nothing: where its
            keys and query disagree, and at a document's first token. Divided by that alone, rounding grows without
            bound: with 1e-6 two trainings that differ in the order of sums are 1 % of their weights apart after 20
            steps, with 1e-2 they stay within 1e-7.
        page_size: Slots in a page of the softmax layers' serving cache.

    Raises:
        ValueError: A value is out of range.
    """

    name: ClassVar[str] = "hybrid"
    supports_context_parallel: ClassVar[bool] = True

    linear_layers: Sequence[int] | Literal["half"] = "half"
    features: Features = "none"
    decay: Decay = "lightning"
    gate: bool = True
    norm_eps: float = 1e-2
    page_size: int = 32

    def __post_init__(self) -> None:
        for name, choices in (("features", get_args(Features)), ("decay", get_args(Decay))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps}; a head may give nothing at all")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, not {self.page_size}; 16 to 64 waste least")
        if isinstance(self.linear_layers, str):
            if self.linear_layers != "half":
                raise ValueError(f"linear_layers is a list of layers or 'half', not {self.linear_layers!r}")
            return
        layers = tuple(sorted(self.linear_layers))  # JSON and YAML know lists alone
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"linear_layers must name one layer or more, each once, not {list(layers)}; "
                "kvtrain.Full() has none that are linear"
            )
        object.__setattr__(self, "linear_layers", layers)

    def chosen_layers(self, host_config: PreTrainedConfig) -> tuple[int, ...]:
        """The linear layers of a host."""
        if self.linear_layers == "half":
            return tuple(whole_layers(host_config)[::2])
        return tuple(map(int, self.linear_layers))

    def slopes(self, num_heads: int) -> list[float] | None:
        """How fast each head of a linear layer forgets: a token's weight falls by ``exp(-slope)`` a step."""
        if self.decay == "none":
            return None
        return [2 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """See ``Method.survives_reentrant_checkpointing``."""
        return True

    def described_cache(self) -> str:
        """See ``Method.described_cache``."""
        return "hybrid, a state of constant size in linear layers"

    def validate(self, host_config: PreTrainedConfig) -> None:
        """See ``Method.validate``."""
        depth, sliding = host_config.num_hidden_layers, windows(host_config)
        for layer in self.chosen_layers(host_config):
            if not 0 <= layer < depth:
                raise ValueError(f"linear_layers names layer {layer}; the host has layers 0 to {depth - 1}")
            if layer in sliding:
                raise ValueError(
                    f"linear_layers names layer {layer}, which sees a window of {sliding[layer]} tokens in the host "
                    f"and is of constant size already; choose from {', '.join(map(str, whole_layers(host_config)))}"
                )

    def repeats(self, host_config: PreTrainedConfig) -> list[Repeat]:
        """See ``Method.repeats``; linear layers come again, and so do the others."""
        if len(set(key_value_shapes(host_config))) > 1:
            return []
        linear = self.chosen_layers(host_config)
        softmax = [layer for layer in whole_layers(host_config) if layer not in linear]
        return [[(layer,) for layer in kind] for kind in (linear, softmax, windows(host_config)) if kind]

    def simplified(self, dropped: Collection[int], host_config: PreTrainedConfig) -> Self:
        """See ``Method.simplified``."""
        linear = self.chosen_layers(host_config)
        left = [layer for layer in range(host_config.num_hidden_layers) if layer not in dropped]
        return replace(self, linear_layers=[place for place, layer in enumerate(left) if layer in linear])
