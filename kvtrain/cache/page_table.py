"""Which pages every head of every row owns, and how many of their slots are in use."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.kernels.page_layout import PageLayout

_UNEVEN = 4  # a table this much wider than the mean head takes little beside the pages: a page has many slots


class _Others(NamedTuple):
    """What the rows that are not chosen have, while others are.

    Attributes:
        rows: ``(R,)`` those that are.
        lengths: ``(B, H)`` of all; 0 for those that are.
        pages: ``(B, H, P)`` of all; -1 for those that are.
        room: As it was for all.
    """

    rows: Tensor
    lengths: Tensor
    pages: Tensor
    room: int


class PageTable:
    """The table of a paged store, and what follows from it until it changes.

    Args:
        num_heads: Key-value heads, H.
        page_size: Slots in a page.
        device: Of its tensors.

    Attributes:
        lengths: ``(B, H)`` slots in use.
        slot_tokens: Tokens that a slot holds, which attention sees one by one.
        room: Tokens that every row can get before a head may need another page, as far as is known on the host.
        others: What other rows have, while a pass is over some.
        padded: Whose the pages are, while shapes are fixed.
    """

    def __init__(self, num_heads: int, page_size: int, device: torch.device | str) -> None:
        self.num_heads, self.page_size, self.slot_tokens = num_heads, page_size, 1
        self.lengths = torch.zeros(0, num_heads, dtype=torch.long, device=device)
        self.pages = torch.zeros(0, num_heads, 0, dtype=torch.int, device=device)
        self.others: _Others | None = None
        self.padded: PageLayout | None = None

    @property
    def pages(self) -> Tensor:
        """``(B, H, P)`` pages of every head in order, int32, -1 where there is none; never written in place."""
        return self._pages

    @pages.setter
    def pages(self, pages: Tensor) -> None:
        self._pages = pages
        self._layout: PageLayout | None = None
        self._to_list: int | None = None
        self._fixed: tuple[Tensor, PageLayout] | None = None
        self._places: tuple[Tensor, Tensor, Tensor] | None = None
        self.room = 0

    @property
    def columns(self) -> int:
        """Pages of the longest head, P."""
        return self.pages.shape[2]

    def layout(self, num_pages: int, copies: bool) -> PageLayout:
        """Whose the pages of a pool are, for attention over all heads; made once until the table changes."""
        if self._layout is None:
            tokens = self.page_size * self.slot_tokens
            self._layout = PageLayout(self.pages.flatten(0, 1), num_pages, tokens, copies)
        return self._layout

    def pages_to_list(self) -> int:
        """See ``RowStore``: enough for all that heads own, and for columns of which there are as many as those say."""
        if self._to_list is None:
            pages = _power_of_two(int(self.owned().sum()))
            while self._columns_for(pages) < self.columns:
                pages *= 2
            self._to_list = pages
        return self._to_list

    def _columns_for(self, pages: int) -> int:
        """Columns of a table for a list of so many pages: one number is to say both.

        The longest head may have ``_UNEVEN`` times the mean; all may be that of a single one.
        """
        heads = _power_of_two(self.pages.shape[0] * self.num_heads)
        return min(pages, max(1, _UNEVEN * pages // heads))

    @contextlib.contextmanager
    def fixed(self, pages: int) -> Iterator[None]:
        """Have a list of so many pages, and the columns that follow from them; meanwhile the table may not change."""
        if self._fixed is None or self._fixed[1].num_listed != pages:
            wide = pad(self.pages, (0, self._columns_for(pages) - self.columns), value=-1)
            self._fixed = wide, PageLayout.padded(wide.flatten(0, 1), self.page_size * self.slot_tokens, pages)
        own, self._pages = self._pages, self._fixed[0]
        self.padded, self._places = self._fixed[1], None
        try:
            yield
        finally:
            self.padded.forget()
            self._pages, self.padded, self._places = own, None, None

    def places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Pages of ``slots (B, H, 1)`` that heads own, and where in them; the slots are in use from then on.

        Layers that share the table ask with the same tensor, and get what the first of them got.
        """
        if self._places is None or self._places[0] is not slots:
            page = self.pages.gather(2, slots // self.page_size).long()
            self._places = slots, page, slots % self.page_size
            self.lengths = torch.maximum(self.lengths, slots.squeeze(2) + 1)
        return self._places[1:]

    def needed(self, lengths: Tensor) -> Tensor:
        """Pages for so many slots ``(B, H)``."""
        return -(-lengths // self.page_size)

    def owned(self) -> Tensor:
        """Pages that each head owns, ``(B, H)``: those of its slots, and perhaps one ahead."""
        return (self.pages >= 0).sum(2)

    def columns_from(self, count: Tensor) -> Tensor:
        """Columns ``(B, H, P)`` from ``count (B, H)`` on."""
        return torch.arange(self.columns, device=count.device) >= count.unsqueeze(-1)

    def add_rows(self, count: int) -> None:
        """Empty ones at the end."""
        self.lengths = pad(self.lengths, (0, 0, 0, count))
        self.pages = pad(self.pages, (0, 0, 0, 0, 0, count), value=-1)

    def widen_to(self, columns: int) -> None:
        """Have so many columns at least."""
        if columns > self.columns:
            self.pages = pad(self.pages, (0, columns - self.columns), value=-1)

    def cut_to(self, columns: int) -> None:
        """Have so many columns at most."""
        if columns < self.columns:
            self.pages = self.pages[..., :columns].clone()

    def put(self, where: Tensor, pages: Tensor) -> None:
        """Enter pages, in order, at the places ``where (B, H, P)`` marks."""
        table = self.pages.clone()
        table[where] = pages
        self.pages = table

    def renumber(self, numbers: Tensor) -> None:
        """Give every page ``p`` the number ``numbers[p]``."""
        self.pages = _renumbered(self.pages, numbers)
        if self.others is not None:
            self.others = self.others._replace(pages=_renumbered(self.others.pages, numbers))

    def shorten_to(self, lengths: Tensor) -> None:
        """Have ``lengths (B, H)`` slots in use, no more than before in any head; pages stay."""
        self.lengths, self._places = lengths, None

    def narrow(self, rows: Tensor) -> None:
        """Have the rows ``(R,)`` alone until ``widen``."""
        lengths, pages, room = self.lengths, self.pages, self.room
        self.lengths, self.pages = lengths[rows], pages[rows]
        self.others = _Others(rows, lengths.index_fill(0, rows, 0), pages.index_fill(0, rows, -1), room)
        self.room = room  # of all rows, and therefore of these

    def widen(self) -> None:
        """Have all rows again."""
        assert self.others is not None
        kept, room = self.others, min(self.room, self.others.room)
        columns = max(self.columns, kept.pages.shape[2])
        chosen, others = (pad(pages, (0, columns - pages.shape[2]), value=-1) for pages in (self.pages, kept.pages))
        self.pages = others.index_copy(0, kept.rows, chosen)
        self.lengths = kept.lengths.index_copy(0, kept.rows, self.lengths)
        self.others, self.room = None, room

    def tensors(self) -> list[Tensor]:
        """All that it holds, of every row."""
        others = [] if self.others is None else [self.others.lengths, self.others.pages]
        return [self.lengths, self.pages, *others]

    def num_bytes(self) -> int:
        """Bytes of these."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def bytes_of(self, rows: int, columns: int) -> int:
        """``num_bytes`` of a table with so many rows and columns, those of other rows besides, which become as wide."""
        others = 0 if self.others is None else self.others.lengths.shape[0]
        slot = columns * self.pages.element_size() + self.lengths.element_size()
        return (rows + others) * self.num_heads * slot


def most_pages(needed: Tensor) -> int:
    """Of pages ``(B, H)``, those of the head that needs most."""
    return int(needed.max()) if needed.numel() else 0


def _power_of_two(number: int) -> int:
    """The least one that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def _renumbered(pages: Tensor, numbers: Tensor) -> Tensor:
    return torch.where(pages >= 0, numbers[pages], pages)
