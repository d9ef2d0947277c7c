"""GEAR (Kang et al. 2024, arXiv 2403.05527): every token stays, in blocks of few bits with what these miss."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from torch import Tensor

from kvtrain.models.eviction.config import Policy, PromptForm, check_one_of
from kvtrain.models.eviction.slots import POSITION
from kvtrain.models.hosts import key_value_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from kvtrain.cache.paged import PagedStore
    from kvtrain.cache.rows import Placement
    from kvtrain.kernels.block_codec import PackedBlocks
    from kvtrain.models.eviction.block_store import BlockStore
    from kvtrain.models.eviction.slots import LayerShape, LayerSlots


@dataclass(frozen=True)
class GEAR(Policy):
    """Keep keys by channel and values by token in ``bits``, outliers and a low rank of what is missed beside them.

    A row's latest tokens stay as they are until there is a block of them. What is kept, how often, and the steps that
    make it are the paper's; the levels of 8 bits are 255, as many outliers of a channel stay as the share says, and the
    power method starts from a cosine transform, where the released code has 63, those of a token, and chance.

    Args:
        bits: Of a channel: 8, 4 or 2.
        block: Tokens of a block.
        outliers: Share of every vector that stays in float16, half of it at each end, at least one there unless 0.
        rank: Of what approaches the rest, in every head.
        prompt: ``"dense"``: a prompt is read as it is and packed when it ends, as published; ``"blocks"``: its blocks
            are packed as they are complete, and memory does not grow with it.
        page_size: Slots in a page of tokens that are not packed yet.

    Raises:
        ValueError: A value is out of range, or a host's heads do not come out in whole bytes.
    """

    name: ClassVar[str] = "gear"

    bits: Literal[2, 4, 8] = 2
    block: int = 64
    outliers: float = 0.02
    rank: int = 4
    prompt: PromptForm = "dense"
    page_size: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits must be 8, 4 or 2, not {self.bits!r}; kvtrain.Full() keeps channels as they are")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, not {self.block}")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers is a share of the entries from 0 to below 1, not {self.outliers}")
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, not {self.rank}")
        check_one_of("prompt", self.prompt, get_args(PromptForm))
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 slot, not {self.page_size}")

    @property
    def every(self) -> int:
        """See ``Policy``."""
        return self.block

    def validate(self, host_config: "PreTrainedConfig") -> None:
        """See ``Method.validate``."""
        super().validate(host_config)
        for _, head_dim in key_value_shapes(host_config):
            self.codec(head_dim)

    def codec(self, head_dim: int) -> "PackedBlocks":
        """How blocks of heads of so many channels are packed."""
        from kvtrain.kernels.block_codec import BlockCodec, PackedBlocks

        shape, at_each_end = (self.block, head_dim), self._at_each_end
        return PackedBlocks(
            BlockCodec(*shape, "channel", self.bits, at_each_end(self.block), self.rank),
            BlockCodec(*shape, "token", self.bits, at_each_end(head_dim), self.rank),
        )

    def _at_each_end(self, length: int) -> int:
        return max(1, round(self.outliers / 2 * length)) if self.outliers else 0

    def described_cache(self) -> str:
        """See ``Method.described_cache``."""
        beside = [f"{self.outliers:.0%} outliers"] * (self.outliers > 0) + [f"rank {self.rank}"] * (self.rank > 0)
        whole = ["prompts whole until they end"] if self.prompt == "dense" else []
        kept = f"blocks of {self.block} tokens in {self.bits} bits a channel"
        return ", ".join([type(self).__name__, " with ".join([kept, *[" and ".join(beside)] * bool(beside)]), *whole])

    def as_served(self, host_config: "PreTrainedConfig") -> "GEAR":
        """See ``Method.as_served``: a row as it is when its prompt has been packed."""
        return replace(self, prompt="blocks")

    def max_slots(self, shape: "LayerShape") -> int | None:
        """See ``Policy``: of tokens that are not packed yet."""
        return self.block if self.prompt == "blocks" else None

    def secondary_store(self, shape: "LayerShape", placement: "Placement", primary: "PagedStore") -> "BlockStore":
        """See ``Policy``."""
        from kvtrain.models.eviction.block_store import BlockStore

        return BlockStore(shape.num_heads, self.codec(shape.head_dim), placement, primary)

    def evict_mask(self, layer: "LayerSlots") -> Tensor:
        """See ``Policy``: all whole blocks settle."""
        whole = layer.tokens // self.block * self.block
        return layer.pages.field(POSITION) < whole[:, None, None]

    def on_evict(self, layer: "LayerSlots", victims: Tensor) -> None:
        """See ``Policy``."""
        from kvtrain.models.eviction.block_store import BlockStore

        store, (slots, real) = layer.secondary, layer.listed(victims)
        assert isinstance(store, BlockStore)
        keys, values = (layer.read_slots(name, slots).unflatten(2, (-1, self.block)) for name in ("keys", "values"))
        store.settle(keys, values, real.unflatten(2, (-1, self.block))[..., 0])


POLICY = GEAR
