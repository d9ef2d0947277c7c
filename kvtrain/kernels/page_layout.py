"""Which heads own the pages that one call attends: the same for every call as long as the table is."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.kernels.memo import Memo

_NOWHERE = 1 << 40  # where a page begins that nobody owns: behind all slots


class Hidden(Memo):
    """Slots that are not visible.

    Args:
        slots: ``(N, S)``.
    """

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots

    def bias(self, dtype: torch.dtype) -> Tensor:
        """``-inf`` on those, 0 on the others, ``(N, S)``."""

        def make() -> Tensor:
            zeros = torch.zeros(self.slots.shape, dtype=dtype, device=self.slots.device)
            return zeros.masked_fill_(self.slots, float("-inf"))

        return self.keep(dtype, make)


class Shown:
    """How much of each page counts, for heads of some lengths.

    Args:
        layout: Of the pages.
        lengths: Visible slots of each head, ``(R,)`` or ``(B, H_kv)``.

    Attributes:
        empty: ``(R, P', 1)`` pages of a head that show nothing.
        hidden: Slots ``(N, S)`` of the pages that are not visible.
    """

    def __init__(self, layout: "PageLayout", lengths: Tensor) -> None:
        self.lengths, by_head = lengths, lengths.flatten()
        self.empty = (by_head[:, None] <= layout.starts).unsqueeze(-1)
        filled = by_head[layout.owner] - layout.begin
        self.hidden = Hidden(torch.arange(layout.page_size, device=filled.device) >= filled[:, None])


class PageLayout:
    """Turns a table around: it says which pages a head has, and a kernel whose batch are pages asks whose each is.

    Where these heads own the smaller part of a pool, their pages are to be copied; otherwise all pages are attended
    where they lie, and of those that belong to others, or to nobody, nothing shows.

    Args:
        table: ``(R, P)`` pages of each head in order, -1 where there is none.
        num_pages: Of the pool.
        page_size: Slots in a page.
        copies: Whether pages must be copied in any case.
        all_columns: Keep those of the table in which these heads have no page: ``P' = P``.

    Attributes:
        pages: ``(N,)`` numbers of the pages that are copied; None where all pages of the pool are attended.
        owner: ``(N,)`` head that each page is attended by.
        begin: ``(N,)`` slot of that head at which the page begins.
        order: ``(R, P')`` where among them the pages of a head are, of which the longest has ``P'``.
        starts: ``(P',)`` slot at which a head's pages begin.
        fixed: Whether the shapes of all these seldom change, as the tables do.
    """

    fixed = False

    def __init__(
        self, table: Tensor, num_pages: int, page_size: int, copies: bool = False, all_columns: bool = False
    ) -> None:
        device, self.page_size = table.device, page_size
        self.pages: Tensor | None = None
        self._latest: Shown | None = None
        head, column = (table >= 0).nonzero(as_tuple=True)
        if not all_columns:  # some rows of a cache come with a table as wide as the longest of all needs it
            table = table[:, : int(column.max()) + 1 if column.numel() else 0]
        self.starts = torch.arange(table.shape[1], device=device) * page_size
        if copies or 2 * head.numel() <= num_pages:
            self.pages, self.owner, self.begin = table[head, column].long(), head, self.starts[column]
            self.order = torch.zeros(table.shape, dtype=torch.long, device=device)
            self.order[head, column] = torch.arange(head.numel(), device=device)
        else:
            pages, self.order = table[head, column], table.clamp(min=0).long()
            self.owner = torch.zeros(num_pages, dtype=torch.long, device=device)
            self.begin = torch.full((num_pages,), _NOWHERE, device=device)
            self.owner[pages], self.begin[pages] = head, self.starts[column]

    @classmethod
    def padded(cls, table: Tensor, page_size: int, num_listed: int) -> "PageLayout":
        """One that copies so many pages; those beyond what heads own show nothing, and nobody asks for them."""
        layout = cls(table, 0, page_size, copies=True, all_columns=True)
        layout.fixed = True
        assert layout.pages is not None
        more = num_listed - len(layout.pages)
        layout.pages, layout.owner = pad(layout.pages, (0, more)), pad(layout.owner, (0, more))
        layout.begin = pad(layout.begin, (0, more), value=_NOWHERE)
        return layout

    @property
    def num_listed(self) -> int:
        """Pages that it lists."""
        return len(self.owner)

    def forget(self) -> None:
        """Let go of what was shown last."""
        self._latest = None

    def shown(self, lengths: Tensor) -> Shown:
        """How much of each page heads of these lengths see; layers that ask with the same tensor share it."""
        if self._latest is None or self._latest.lengths is not lengths:
            self._latest = Shown(self, lengths)
        return self._latest
