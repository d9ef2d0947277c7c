"""Settings of the identity method."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvtrain.models.method import Method, check_kv_bits


@dataclass(frozen=True)
class Full(Method):
    """Keep every key and value: the host as it was, on kvtrain's pages and kernels.

    Args:
        kv_bits: Bits of a channel in the serving cache, 8, 4 or 2; every token's key and value in every head has a
            scale and a zero of its own, 4 bytes more. Every token reads all keys and values so, its own too: however a
            text is cut, and in evaluation mode without a cache, a model computes the same. Training mode alone does not
            quantize. None keeps them in the model's dtype.

    Raises:
        ValueError: Other bits.
    """

    name: ClassVar[str] = "full"
    supports_context_parallel: ClassVar[bool] = True
    supports_attention_sinks: ClassVar[bool] = True

    kv_bits: Literal[2, 4, 8] | None = None

    def __post_init__(self) -> None:
        check_kv_bits(self.kv_bits)

    @property
    def is_host(self) -> bool:
        """See ``Method.is_host``."""
        return self.kv_bits is None

    @property
    def trains_as_host(self) -> bool:
        """See ``Method.trains_as_host``."""
        return True

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """See ``Method.survives_reentrant_checkpointing``."""
        return True

    def assisted_options(self) -> dict[str, Any]:
        """See ``Method.assisted_options``; nothing is ever dropped."""
        return {}
