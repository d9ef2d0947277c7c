"""Runs of pages that are copied side by side, for calls with many queries; and those copies, for calls that follow."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvtrain.kernels.page_layout import Hidden

_RUN_SLOTS = 1024  # slots of one head that are copied at a time


class Run(NamedTuple):
    """Some columns of a table, for those heads that are as long.

    Attributes:
        heads: ``(N,)`` which of them; None: all.
        pages: ``(N, P')`` their pages; whatever page where there is none.
        hidden: Slots ``(N, P' * page_size)`` that are not visible.
    """

    heads: Tensor | None
    pages: Tensor
    hidden: Hidden


class PageRuns:
    """The first slots of some heads, as runs of pages.

    Where the same keys and values are attended again and again, as by the layers and passes of a stage that iterates, a
    caller hands in one object each time: what was copied once is read again, as far as ``kept_bytes`` go. That holds
    for as long as nobody writes into these slots.

    Args:
        table: ``(R, P)`` pages of each head in order, -1 where there is none.
        lengths: ``(R,)`` slots that count.
        page_size: Slots in a page.
        kept_bytes: Of copies at most.
    """

    def __init__(self, table: Tensor, lengths: Tensor, page_size: int, kept_bytes: int = 0) -> None:
        self._runs = list(_runs(table, lengths, page_size))
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._left = kept_bytes

    def copies(self, read: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Iterator[tuple[Run, Tensor, Tensor]]:
        """Every run, with its keys ``(N, S, D)`` and values ``(N, S, D_v)``.

        Args:
            read: Copies of keys and values of the pages ``(N, P')``, ``(N, P', page_size, channels)``.
        """
        for index, run in enumerate(self._runs):
            copy = self._copies.get(index)
            if copy is None:
                keys, values = read(run.pages)
                copy = keys.flatten(1, 2), values.flatten(1, 2)
                size = keys.nbytes + values.nbytes
                if size <= self._left:
                    self._left -= size
                    self._copies[index] = copy
            yield run, *copy


def _runs(table: Tensor, lengths: Tensor, page_size: int) -> Iterator[Run]:
    """As far as the longest head reaches: the table of some rows may be as wide as others need it."""
    columns = max(1, _RUN_SLOTS // page_size)
    longest = int(lengths.max()) if lengths.numel() else 0
    for begin in range(0, -(-longest // page_size), columns):
        end = min(begin + columns, -(-longest // page_size))
        left = lengths - begin * page_size
        some = (left > 0).nonzero().squeeze(1)  # lengths may differ much, by head and by row
        heads = None if len(some) == len(lengths) else some
        pages, left = (table[:, begin:end], left) if heads is None else (table[heads, begin:end], left[heads])
        slots = torch.arange((end - begin) * page_size, device=table.device)
        yield Run(heads, pages.clamp(min=0), Hidden(slots >= left[:, None]))
