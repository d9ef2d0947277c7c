"""A second store beside the pages of a policy, for what has left them and is attended all the same."""

from torch import Tensor
from torch.nn.functional import pad

from kvtrain.cache.paged import PagedStore
from kvtrain.cache.rows import Placement
from kvtrain.models.eviction.budgets import BudgetedEviction, least_budgets
from kvtrain.models.eviction.slots import LayerShape


class SecondaryStore(PagedStore):
    """Slots that a budget has no room for; no token of a head is in both stores, and none is in neither.

    Byte budgets count with every slot that is above its head's budget at present: it may come at once.

    Args:
        policy: Has the budget.
        shape: Of the layer.
        placement: Where tensors lie.
        primary: The pages that slots come from.
        bits: Of a channel.
        group: Channels that share a scale; None: all of a vector.
    """

    def __init__(
        self,
        policy: BudgetedEviction,
        shape: LayerShape,
        placement: Placement,
        primary: PagedStore,
        bits: int,
        group: int | None = None,
    ) -> None:
        dims = {"keys": shape.head_dim, "values": shape.head_dim}
        super().__init__(shape.num_heads, dims, policy.page_size, placement, bits, group=group)
        self.policy, self.shape, self.primary = policy, shape, primary

    def _longest(self, tokens: int, rows: int) -> Tensor:
        """See ``PageAllocator``."""
        here = pad(self.lengths, (0, 0, 0, rows))
        seen = here + pad(self.primary.lengths, (0, 0, 0, rows)) + tokens
        return here.maximum(seen - least_budgets(self.policy, self.shape, seen))

    def take_ahead(self, answer: list[int]) -> None:
        """See ``RowStore``; pages that there is room for are taken when slots come."""
        if answer[0]:
            self.rows.room = 0
        else:
            super().take_ahead(answer)
