"""Settings of DuoAttention (Xiao et al. 2024, arXiv 2410.10819)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from transformers import PreTrainedConfig

from kvtrain.models.hosts import common_key_value_shape, whole_layers, windows
from kvtrain.models.method import Method, Repeat, check_kv_bits

Mixing = Literal["self", "teacher"]
GateKind = Literal["plain", "hard_concrete"]
_GUESSES = 64  # tokens that assisted decoding may take back


@dataclass(frozen=True)
class Duo(Method):
    """Give every key-value head a gate, learn the gates, round them: full heads and streaming heads.

    While gates are fractions a head is ``(1 - gate) * window + gate * everything`` and there is no cache;
    ``model.binarize(sparsity)`` rounds them and sorts the heads of every layer, full ones first.

    Args:
        sink: First tokens that a streaming head keeps.
        recent: Latest tokens that it keeps, the current one included.
        mixing: Whose attention over everything a gate mixes in while it is learnt: the model's own (``"self"``, the
            paper's formula) or that of the untouched model at the same place (``"teacher"``, the released code).
        gates: ``"plain"`` numbers from 0 to 1, or ``"hard_concrete"`` random ones (Louizos et al. 2018; PruLong),
            which are drawn anew at every step and end up at 0 or 1 by themselves.
        sparsity: Share of streaming heads that ``kvtrain export`` rounds to.
        full_heads: The key-value heads of each layer that keep everything, as the base numbers them; none of layers
            that slide in the host, which stay as they are. Set by rounding.
        page_size: Slots in a page of the serving cache.
        compensation: Streaming heads also see one token that stands for all that they have dropped (RazorAttention).
        kv_bits: Bits of a channel in the serving cache, 8, 4 or 2, as in ``kvtrain.Full``, in full and in streaming
            heads alike: one attention reads both. Training mode alone does not quantize. None keeps keys and values in
            the model's dtype.

    Raises:
        ValueError: A value is out of range.
    """

    name: ClassVar[str] = "duo"
    supports_context_parallel: ClassVar[bool] = True
    supports_attention_sinks: ClassVar[bool] = True

    sink: int = 128
    recent: int = 256
    mixing: Mixing = "self"
    gates: GateKind = "plain"
    sparsity: float = 0.5
    full_heads: Sequence[Sequence[int]] | None = None
    page_size: int = 32
    compensation: bool = False
    kv_bits: Literal[2, 4, 8] | None = None

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise ValueError(
                f"streaming heads keep sink >= 0 first and recent >= 1 latest tokens, not {self.sink} and {self.recent}"
            )
        if self.mixing not in get_args(Mixing):
            raise ValueError(f"mixing must be {' or '.join(get_args(Mixing))}, not {self.mixing!r}")
        if self.gates not in get_args(GateKind):
            raise ValueError(f"gates must be {' or '.join(get_args(GateKind))}, not {self.gates!r}")
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"sparsity is the share of streaming heads, from 0 to 1, not {self.sparsity}")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, not {self.page_size}")
        check_kv_bits(self.kv_bits)
        if self.full_heads is not None:  # JSON and YAML know lists alone
            object.__setattr__(self, "full_heads", tuple(tuple(sorted(heads)) for heads in self.full_heads))

    def repeats(self, host_config: PreTrainedConfig) -> list[Repeat]:
        """See ``Method.repeats``; of a rounded model each layer is its own."""
        return [] if self.full_heads is not None else super().repeats(host_config)

    @property
    def servable(self) -> bool:
        """See ``Method.servable``."""
        return self.full_heads is not None

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """See ``Method.survives_reentrant_checkpointing``: gates that train go another way."""
        return self.full_heads is not None

    def validate(self, host_config: PreTrainedConfig) -> None:
        """See ``Method.validate``."""
        heads, depth = common_key_value_shape(host_config)[0], host_config.num_hidden_layers
        if self.full_heads is None:
            return
        if len(self.full_heads) != depth:
            raise ValueError(f"full_heads names {len(self.full_heads)} layers and the host has {depth}")
        sliding = windows(host_config)
        for layer, chosen in enumerate(self.full_heads):
            if chosen and layer in sliding:
                raise ValueError(
                    f"full_heads of layer {layer} are {list(chosen)}, but it slides in the host; name none"
                )
            if len(set(chosen)) != len(chosen) or any(not 0 <= head < heads for head in chosen):
                raise ValueError(
                    f"full_heads of layer {layer} are {list(chosen)}; give different numbers from 0 to {heads - 1}"
                )

    def assisted_options(self) -> dict[str, Any]:
        """See ``Method.assisted_options``; room for more guesses than assistants make at a time."""
        return {"slack": _GUESSES}

    def rounded(self, full_heads: Sequence[Sequence[int]]) -> "Duo":
        """These settings for rounded heads."""
        return replace(self, full_heads=full_heads)

    def as_served(self, host_config: PreTrainedConfig) -> "Duo":
        """See ``Method.as_served``: which heads are full makes no difference to the bytes."""
        import torch

        from kvtrain.models.duo.gates import by_layer, choose_full_heads

        if self.full_heads is not None:
            return self
        equal = torch.zeros(len(whole_layers(host_config)), common_key_value_shape(host_config)[0])
        return self.rounded(by_layer(choose_full_heads(equal, self.sparsity), host_config))
