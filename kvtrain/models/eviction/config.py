"""What eviction policies share: their settings, and the questions that a policy answers."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from transformers import PreTrainedConfig

from kvtrain.models.method import Method, Repeat, check_kv_bits

if TYPE_CHECKING:
    from torch import Tensor

    from kvtrain.cache.paged import PagedStore
    from kvtrain.cache.rows import Placement
    from kvtrain.models.eviction.cache import EvictingCacheLayer, LayerShape
    from kvtrain.models.eviction.observation import Observation

PromptForm = Literal["dense", "blocks"]
PerHead = Literal["same", "adaptive"]


@dataclass(frozen=True)
class Eviction(Method):
    """Evict slots of key-value heads while serving, on pages that are really freed.

    Policies are subclasses in ``policies/``: a frozen dataclass with a ``name``, which answers ``evict_mask``, or with
    a budget ``BudgetedEviction.scores``, and of the other questions those that it has an answer to. What it notes in
    fields of slots and in a row's state goes wherever the slot and the row go.

    Args:
        recent: Latest tokens that always stay.
        sink: First tokens that always stay.
        every: A row evicts whenever it has seen a multiple of so many tokens: 1 is what papers do, 16 costs next to
            nothing in a decoding step. New tokens go through a layer in blocks that end there, so that neither chunks
            nor other rows change anything.
        prompt: ``"dense"``: a prompt is read in full and cut once, when it ends, as published; ``"blocks"``: it is cut
            as everything else is, and memory does not grow with it.
        kv_bits: Bits of a channel in the serving cache, 8 or 4, as in ``kvtrain.Full``; fields are kept as they are.
        page_size: Slots in a page of the serving cache.

    Raises:
        ValueError: A value is out of range.
    """

    has_parallel_form: ClassVar[bool] = False
    # Scalars that are kept beside every slot, 0 in a new one, and the name of their dtype; None: at least float32,
    # because sums lose themselves in half precision.
    slot_fields: ClassVar[Mapping[str, str | None]] = {}
    # How many of the latest queries of a pass ``observe`` wants to see; None: all.
    num_observed_queries: ClassVar[int | None] = 0

    recent: int = 0
    sink: int = 0
    every: int = 1
    prompt: PromptForm = "dense"
    kv_bits: Literal[4, 8] | None = None
    page_size: int = 32

    def __post_init__(self) -> None:
        if self.recent < 0 or self.sink < 0:
            raise ValueError(f"recent and sink are numbers of tokens, not {self.recent} and {self.sink}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1 token, not {self.every}")
        check_one_of("prompt", self.prompt, get_args(PromptForm))
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, not {self.page_size}")
        check_kv_bits(self.kv_bits)

    @abstractmethod
    def evict_mask(self, layer: "EvictingCacheLayer") -> "Tensor":
        """Slots ``(B, H_kv, K)`` that leave where their row evicts; marks of slots that are not in use are ignored."""

    def observe(self, seen: "Observation") -> None:
        """Note in fields of slots what attention gave them; called for every tile of probabilities of a pass."""

    def on_evict(self, layer: "EvictingCacheLayer", victims: "Tensor") -> None:
        """The slots ``(B, H_kv, K)``, all in use, are about to leave: merge them into others, or keep them apart."""

    def query_window(self) -> int:
        """How many of a row's latest queries are remembered, with their log-sum-exp."""
        return 0

    def secondary_store(
        self, shape: "LayerShape", placement: "Placement", primary: "PagedStore"
    ) -> "PagedStore | None":
        """A second store of keys and values, which is attended, too; what it may need it says before a pass begins."""
        return None

    def row_state(self, shape: "LayerShape") -> Mapping[str, Any]:
        """What is kept for a row besides, as ``StateStore`` takes it."""
        return {}

    def share_budgets(self, rows: "Tensor", layers: "list[EvictingCacheLayer]") -> None:
        """The prompts of the rows ``(B,)`` are over and no layer has cut them yet: divide a budget over all layers."""

    def described_cache(self) -> str:
        """See ``Method.described_cache``."""
        bits = [] if self.kv_bits is None else [f"{self.kv_bits} bits a channel"]
        whole = ["prompts whole until they end"] if self.prompt == "dense" else []
        return ", ".join([type(self).__name__, *bits, *self.described_slots(), *whole])

    def described_slots(self) -> list[str]:
        """What is kept, in a few words each."""
        return []

    def as_served(self, host_config: PreTrainedConfig) -> "Eviction":
        """See ``Method.as_served``: a row as it is when its prompt has been cut."""
        return replace(self, prompt="blocks")

    @property
    def first_eviction(self) -> int:
        """Number of a row's tokens up to which nothing leaves, whatever they are."""
        return 0

    def max_slots(self, shape: "LayerShape") -> int | None:
        """The most slots that a head of a layer comes to between two evictions; None where nothing bounds it."""
        return None


@dataclass(frozen=True)
class BudgetedEviction(Eviction):
    """Keep in every key-value head the slots that a policy scores highest.

    Args:
        budget: Slots that a key-value head keeps, ``recent`` and ``sink`` included; a float up to 1 is the share of the
            tokens that its row has seen.
        per_head: The ``"same"`` budget for every head, or an ``"adaptive"`` one: that of a layer goes where scores are
            highest (Ada-KV, Feng et al. 2024, arXiv 2407.11550).
        floor: Share of its equal part that a head keeps in any case where budgets are adaptive.
        per_layer: The ``"same"`` budget for every layer, or one that falls linearly from the lowest layer to the
            highest, a ``"pyramid"`` (PyramidKV, Cai et al. 2024, arXiv 2406.02069).
        beta: Steepness of the pyramid: the highest layer keeps ``1 / beta`` of the mean budget besides ``recent``.

    Raises:
        ValueError: See ``Eviction``.
    """

    layer_budgets: ClassVar[tuple[str, ...]] = ("same", "pyramid")

    budget: int | float = 256
    per_head: PerHead = "same"
    floor: float = 0.2
    per_layer: str = "same"
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = isinstance(self.budget, float)
        if not (0 < self.budget <= 1 if is_share else self.budget >= 1):
            raise ValueError(f"budget is a number of slots from 1 on, or a share up to 1.0, not {self.budget!r}")
        if not is_share and self.recent + self.sink > self.budget:
            raise ValueError(
                f"{self.sink} first and {self.recent} latest tokens do not fit a budget of {self.budget} slots; "
                "raise budget, or lower recent and sink"
            )
        check_one_of("per_head", self.per_head, get_args(PerHead))
        check_one_of("per_layer", self.per_layer, self.layer_budgets)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share of a head's part of the budget, from 0 to 1, not {self.floor}")
        if self.beta < 1:
            raise ValueError(f"beta must be at least 1, not {self.beta}; 1 gives every layer the same budget")

    @abstractmethod
    def scores(self, layer: "EvictingCacheLayer") -> "Tensor":
        """What every slot is worth, ``(B, H_kv, K)``; the lowest leave. What is not in use may have any score."""

    def evict_mask(self, layer: "EvictingCacheLayer") -> "Tensor":
        """See ``Eviction``: what is above the budget."""
        from kvtrain.models.eviction.budgets import above_budget

        return above_budget(self, layer, self.scores(layer))

    def row_budgets(self, layer: "EvictingCacheLayer") -> "Tensor":
        """Slots that the heads of a layer may keep in the mean, ``(B,)``."""
        from kvtrain.models.eviction.budgets import row_budgets

        return row_budgets(self, layer.shape, layer.tokens)

    @property
    def first_eviction(self) -> int:
        """See ``Eviction``: the least budget of a layer."""
        if isinstance(self.budget, float):
            return 0
        return self.budget if self.per_layer == "same" else int(self.recent + (self.budget - self.recent) / self.beta)

    def max_slots(self, shape: "LayerShape") -> int | None:
        """See ``Eviction``."""
        from kvtrain.models.eviction.budgets import max_slots

        return max_slots(self, shape)

    def described_slots(self) -> list[str]:
        """See ``Eviction``."""
        return [f"{self.budget:.0%} of the tokens" if isinstance(self.budget, float) else f"{self.budget} slots a head"]

    @property
    def compression(self) -> float:
        """Tokens that share a slot in the mean, where the budget is a share of them."""
        return 1 / self.budget if isinstance(self.budget, float) else 1.0

    def as_served(self, host_config: PreTrainedConfig) -> "Eviction":
        """See ``Method.as_served``; heads with budgets of their own have the same ones in the mean."""
        return replace(self, prompt="blocks", per_head="same")

    def repeats(self, host_config: PreTrainedConfig) -> list[Repeat]:
        """See ``Method.repeats``; layers with budgets of their own are all different."""
        return super().repeats(host_config) if self.per_layer == "same" else []


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a setting that is none of those that there are.

    Raises:
        ValueError: It is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(repr(one) for one in known)}, not {value!r}")
