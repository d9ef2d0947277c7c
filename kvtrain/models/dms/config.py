"""Settings of Dynamic Memory Sparsification (Łańcucki et al. 2025, arXiv 2506.05345)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from kvtrain.models.method import Method, check_kv_bits

DecideBy = Literal["adapter", "query_channel"]
Trainable = Literal["adapter", "all"]
_MOST = 1 << 20  # tokens, more than a row has; in float32 the share that far larger targets leave is none at all


@dataclass(frozen=True)
class DMS(Method):
    """Mark tokens for eviction, by decisions that each key-value head learns; they leave ``window`` tokens later.

    A token decides about the one before it. Defaults are those of the released recipe (NVIDIA Model Optimizer,
    ``experimental/dms``).

    Args:
        compression: Tokens for each that is not marked, averaged over layers and heads, which training aims at; at
            least 1, at most 2**20.
        window: Tokens for which a marked one is still seen: by the ``window`` that come after it.
        trainable: What training may change: the decisions' own parameters (``"adapter"``, the released recipe), or
            ``"all"`` (the paper's).
        temperature: Of the relaxed decisions while training.
        page_size: Slots in a page of the serving cache; 16 to 64 waste least.
        kv_bits: Bits of a channel in the serving cache, 8, 4 or 2, as in ``kvtrain.Full``.
        decide_by: Where decisions come from: a norm and a projection of their own, read from what enters a layer
            (``"adapter"``), or the last channel of the first query head of every group, before RoPE, which then takes
            no part in attention (``"query_channel"``; the published Qwen3-8B-DMS-8x).
        shared_decisions: All heads of a layer follow the decisions of its first.
        decision_scale: Factor on what decisions are read from, before ``init_bias``: they learn at so large a multiple
            of the learning rate.
        init_bias: Subtracted from it, so that a fresh retrofit marks next to nothing.

    Raises:
        ValueError: A value is out of range.
    """

    name: ClassVar[str] = "dms"
    supports_context_parallel: ClassVar[bool] = True
    supports_attention_sinks: ClassVar[bool] = True

    compression: float = 8.0
    window: int = 512
    trainable: Trainable = "adapter"
    temperature: float = 0.1
    page_size: int = 32
    kv_bits: Literal[2, 4, 8] | None = None
    decide_by: DecideBy = "adapter"
    shared_decisions: bool = False
    decision_scale: float = 100.0
    init_bias: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.compression <= _MOST:
            raise ValueError(
                f"compression is in tokens for each that stays, from 1 to {_MOST:,}, not {self.compression:g}"
            )
        if self.window < 0:
            raise ValueError(f"window must not be negative, not {self.window}; 0 lets marked tokens leave at once")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.decision_scale <= 0:
            raise ValueError(f"decision_scale must be above 0, not {self.decision_scale}; 100 is the released code's")
        if self.trainable not in get_args(Trainable):
            raise ValueError(f"trainable must be {' or '.join(get_args(Trainable))}, not {self.trainable!r}")
        if self.decide_by not in get_args(DecideBy):
            raise ValueError(f"decide_by must be {' or '.join(get_args(DecideBy))}, not {self.decide_by!r}")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, not {self.page_size}; 16 to 64 waste least")
        check_kv_bits(self.kv_bits)

    def expected_slots(self, tokens: int) -> float:
        """See ``Method.expected_slots``: the window, and of what is older the share that is not marked."""
        old = max(0, tokens - self.window - 1)
        return tokens - old + old / self.compression
