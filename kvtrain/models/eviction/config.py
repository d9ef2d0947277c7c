"""What eviction policies share: their settings, and the questions that a policy answers."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.models.method import Method, check_kv_bits

if TYPE_CHECKING:
    from kvtrain.cache.paged import PagedStore
    from kvtrain.cache.rows import Placement
    from kvtrain.models.eviction.observation import NewQueries, Observation
    from kvtrain.models.eviction.slots import LayerShape, LayerSlots

PromptForm = Literal["dense", "blocks"]


@dataclass(frozen=True)
class Policy(Method):
    """What becomes of a head's tokens is decided while serving, by questions that subclasses answer.

    Whenever a row has seen a multiple of ``every`` tokens, slots leave the pages that new tokens enter: for good, or
    for a second store, which is attended, too. Policies are subclasses in ``policies/``: a frozen dataclass with a
    ``name``. What it notes in fields of slots and in a row's state goes wherever the slot and the row go.
    """

    has_parallel_form: ClassVar[bool] = False
    supports_attention_sinks: ClassVar[bool] = True
    # Scalars that are kept beside every slot, 0 in a new one, and the name of their dtype; None: at least float32,
    # because sums lose themselves in half precision.
    slot_fields: ClassVar[Mapping[str, str | None]] = {}
    # How many of the latest queries of a pass ``observe`` wants to see; None: all.
    num_observed_queries: ClassVar[int | None] = 0

    @property
    @abstractmethod
    def every(self) -> int:
        """At multiples of how many of a row's tokens slots leave."""

    @property
    @abstractmethod
    def prompt(self) -> PromptForm:
        """See ``Eviction``."""

    @property
    @abstractmethod
    def page_size(self) -> int:
        """Slots in a page of the serving cache."""

    @property
    def recent(self) -> int:
        """Latest tokens that always stay."""
        return 0

    @property
    def sink(self) -> int:
        """First tokens that always stay."""
        return 0

    @property
    def kv_bits(self) -> Literal[2, 4, 8] | None:
        """Bits of a channel on the pages that new tokens enter; None keeps them as they are."""
        return None

    @abstractmethod
    def evict_mask(self, layer: "LayerSlots") -> Tensor:
        """Slots ``(B, H_kv, K)`` that leave where their row evicts; marks of slots that are not in use are ignored."""

    def observe(self, seen: "Observation") -> None:
        """Note in fields of slots what attention gave them; called for every tile of probabilities of a pass."""

    def observe_queries(self, layer: "LayerSlots", new: "NewQueries") -> None:
        """Note in a row's state what its new queries are like, before anything leaves behind them."""

    def on_evict(self, layer: "LayerSlots", victims: Tensor) -> None:
        """The slots ``(B, H_kv, K)``, all in use, are about to leave: merge them into others, or keep them apart."""

    def query_window(self) -> int:
        """How many of a row's latest queries are remembered, with their log-sum-exp."""
        return 0

    def secondary_store(
        self, shape: "LayerShape", placement: "Placement", primary: "PagedStore"
    ) -> "PagedStore | None":
        """A second store of keys and values, which is attended, too; what it may need it says before a pass begins."""
        return None

    def secondary_query(self, layer: "LayerSlots", query: Tensor) -> Tensor:
        """What is asked of the second store for a query ``(B, H, n, D)``, where its keys are kept in another scale."""
        return query

    def row_state(self, shape: "LayerShape") -> Mapping[str, Any]:
        """What is kept for a row besides, as ``StateStore`` takes it."""
        return {}

    def on_prompt_end(self, rows: Tensor, layers: "list[LayerSlots]") -> None:
        """The prompts of the rows ``(B,)`` are over and no layer has cut them yet: decide what they decide for good."""

    def described_slots(self) -> list[str]:
        """What is kept, in a few words each."""
        return []

    @property
    def first_eviction(self) -> int:
        """Number of a row's tokens up to which nothing leaves, whatever they are."""
        return 0

    def max_slots(self, shape: "LayerShape") -> int | None:
        """The most slots that a head of a layer comes to between two evictions; None where nothing bounds it."""
        return None


@dataclass(frozen=True)
class Eviction(Policy):
    """Evict slots of key-value heads while serving, on pages that are really freed.

    A policy answers ``evict_mask``, or with a budget ``BudgetedEviction.scores``, and of the other questions those that
    it has an answer to.

    Args:
        recent: Latest tokens that always stay.
        sink: First tokens that always stay.
        every: A row evicts whenever it has seen a multiple of so many tokens: 1 is what papers do, 16 costs next to
            nothing in a decoding step. New tokens go through a layer in blocks that end there, so that neither chunks
            nor other rows change anything.
        prompt: ``"dense"``: a prompt is read in full and cut once, when it ends, as published; ``"blocks"``: it is cut
            as everything else is, and memory does not grow with it.
        kv_bits: Bits of a channel in the serving cache, 8, 4 or 2, as in ``kvtrain.Full``; fields are kept as they are.
        page_size: Slots in a page of the serving cache.

    Raises:
        ValueError: A value is out of range.
    """

    recent: int = 0
    sink: int = 0
    every: int = 1
    prompt: PromptForm = "dense"
    kv_bits: Literal[2, 4, 8] | None = None
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

    def described_cache(self) -> str:
        """See ``Method.described_cache``."""
        bits = [] if self.kv_bits is None else [f"{self.kv_bits} bits a channel"]
        whole = ["prompts whole until they end"] if self.prompt == "dense" else []
        return ", ".join([type(self).__name__, *bits, *self.described_slots(), *whole])

    def as_served(self, host_config: PreTrainedConfig) -> "Eviction":
        """See ``Method.as_served``: a row as it is when its prompt has been cut."""
        return replace(self, prompt="blocks")


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a setting that is none of those that there are.

    Raises:
        ValueError: It is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(repr(one) for one in known)}, not {value!r}")
