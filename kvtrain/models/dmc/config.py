"""Settings of Dynamic Memory Compression (Nawrot et al. 2024, arXiv 2403.09636)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvtrain.models.method import Method

_MOST = 1 << 20  # tokens, more than a row has; in float32 the share that far larger targets leave is none at all


@dataclass(frozen=True)
class DMC(Method):
    """Merge tokens into the slot before them, by decisions that each key-value head learns.

    Args:
        compression: Tokens per kept slot that training aims at, averaged over layers and heads
            (section 3.2); at least 1, at most 2**20.
        window: Latest tokens of a segment that count in its mean (released code: 12).
        temperature: Of the relaxed decisions while training (released code: 0.1).
        init_bias: Subtracted from the decision channel and added to the importance channel, so that a
            fresh retrofit merges next to nothing (released code: 5).
        decision_scale: Factor on the decision channel, before ``init_bias``. The released code has none, and
            6,000 steps to learn in; short retrofits learn decisions at this multiple of the learning rate
            (DMS, by the same authors, uses 100).
        page_size: Slots in a page of the serving cache; 16 to 64 waste least.
        shared_decisions: All heads of a layer merge the same tokens (DMC-C, section 5): weaker, but every head of a
            row then has the same length.
        decisions: ``"learned"``, or ``"random"``: the control that merges with probability
            ``1 - 1 / compression`` whatever the token is.

    Raises:
        ValueError: A value is out of range.
    """

    name: ClassVar[str] = "dmc"
    supports_context_parallel: ClassVar[bool] = True
    supports_attention_sinks: ClassVar[bool] = True

    compression: float = 4.0
    window: int = 12
    temperature: float = 0.1
    init_bias: float = 5.0
    decision_scale: float = 1.0
    page_size: int = 32
    shared_decisions: bool = False
    decisions: Literal["learned", "random"] = "learned"

    def __post_init__(self) -> None:
        if self.compression < 1:
            raise ValueError(f"compression must be at least 1 (tokens per slot), not {self.compression}")
        if self.compression > _MOST:
            raise ValueError(f"compression must be at most {_MOST:,} (tokens per slot), not {self.compression:g}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, not {self.window}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.decision_scale <= 0:
            raise ValueError(f"decision_scale must be above 0, not {self.decision_scale}; 1 is the released code's")
        if self.decisions not in ("learned", "random"):
            raise ValueError(f"decisions must be 'learned' or 'random', not {self.decisions!r}")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, not {self.page_size}; 16 to 64 waste least")
