"""What every store of a cache can do with its rows; nothing here knows attention."""

import contextlib
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from kvtrain.cache.budget import ByteBudget

RowSnapshot = dict[str, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


class _Step:
    """Whether a step is run whose shapes are fixed.

    A compiler looks at this before every call of what it has made, so that steps take turns.
    """

    fixed = False
    turn = threading.RLock()


@contextlib.contextmanager
def fixed_step() -> Iterator[None]:
    """Let ``torch.compile`` into ``bookkeeping``: what runs here takes nothing and asks nothing (``KVCache.fixed``)."""
    with _Step.turn:
        before, _Step.fixed = _Step.fixed, True
        try:
            yield
        finally:
            _Step.fixed = before


def bookkeeping(function: Function) -> Function:
    """Keep ``torch.compile`` out of a function: how much it takes and where it writes depends on what tensors hold."""
    apart = torch.compiler.disable(function)

    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if _Step.fixed else apart(*args, **kwargs)

    return cast("Function", chosen)


@dataclass(frozen=True)
class Placement:
    """Where and as what a cache keeps its tensors.

    Args:
        dtype: Of keys and values.
        device: Of everything.
        budget: Limit on bytes, or None.
        reserve: Bytes that each store's pages may come to, taken once, and rows of constant size, for which there is
            room ahead; None: as many as they need at a time.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    budget: ByteBudget | None = None
    reserve: int | None = None

    def shared_by(self, layers: int) -> "Placement":
        """That of a store which keeps what so many layers would keep apart."""
        if self.reserve is None or self.budget is None:
            return self
        return replace(self, reserve=min(self.budget.limit, layers * self.reserve))


@dataclass(frozen=True)
class CacheSnapshot:
    """One row of a cache, as ``snapshot_row`` saw it.

    Attributes:
        stores: State of every store.
        seen: Logical length of the cache at that time.
    """

    stores: list[RowSnapshot]
    seen: int

    def num_bytes(self) -> int:
        """Bytes that it holds; no budget counts them."""
        return sum(tensor.nbytes for store in self.stores for tensor in store.values())

    def to(self, device: torch.device | str) -> "CacheSnapshot":
        """The same on another device, such as the CPU for a row that is swapped out."""
        moved = [{name: tensor.to(device) for name, tensor in store.items()} for store in self.stores]
        return CacheSnapshot(moved, self.seen)


class RowStore(ABC):
    """Per-row state of one layer: rows are admitted, reordered, joined, freed; nothing outlives its row.

    Whatever needs more bytes than the budget allows raises ``CacheFullError`` and changes nothing.

    Args:
        placement: Where tensors lie.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        if placement.budget is not None:
            placement.budget.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy counts with the budget, too."""
        self.__dict__.update(state)
        if self.placement.budget is not None:
            self.placement.budget.register(self)

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows held, B."""

    @abstractmethod
    def admit(self, count: int) -> None:
        """Add empty rows at the end."""

    @abstractmethod
    def select_rows(self, indices: Tensor) -> None:
        """Keep, repeat, reorder or drop rows.

        Args:
            indices: ``(B_new,)`` rows to take, in order.
        """

    @abstractmethod
    def join(self, other: Self) -> None:
        """Copy the rows of a store of the same shape to the end."""

    @abstractmethod
    def snapshot_row(self, row: int) -> RowSnapshot:
        """A copy of one row that later writes do not touch."""

    @abstractmethod
    def restore_row(self, row: int, snapshot: RowSnapshot) -> None:
        """Put a row back to what ``snapshot_row`` of this or of a like store saw."""

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Let one row hold what another one does; what it held before is forgotten."""

    @abstractmethod
    def clear_rows(self, rows: Tensor) -> None:
        """Forget what the rows ``(R,)`` hold; they stay, empty."""

    @abstractmethod
    def row_bytes(self) -> Tensor:
        """Bytes that each row holds, ``(B,)``."""

    @abstractmethod
    def narrow(self, rows: Tensor) -> None:
        """Let the rows ``(R,)``, all different, be the only ones, in this order, until ``widen``.

        Meanwhile tokens may come and go, and rows may not; ``bytes_for`` is of the tokens of these rows, and counts
        what all of them hold.
        """

    @abstractmethod
    def widen(self) -> None:
        """Let all rows be there again, those that ``narrow`` had chosen as they are now."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every tensor that the store holds."""

    @abstractmethod
    def bytes_for(self, tokens: int, rows: int = 0) -> int:
        """Bytes that the next ``tokens`` of every row may need at most, with ``rows`` more rows."""

    def ask_ahead(self) -> Tensor | None:
        """What must be known of the device before every row gets one more token; None where nothing has to be taken.

        Asked of all stores at once, and then given to ``take_ahead``, so that a step asks the device once at most.
        """
        return None

    def bytes_ahead(self, answer: list[int]) -> int:
        """Bytes that ``take_ahead`` will take."""
        return 0

    def take_ahead(self, answer: list[int]) -> None:
        """Take what one more token of every row may need, as ``ask_ahead`` has found."""

    def pages_to_list(self) -> int:
        """The power of two to which the list of pages that rows own must be filled up; 0 where there is none.

        Raises:
            ValueError: Pages are not reserved, so that shapes change as they are taken.
        """
        return 0

    @contextlib.contextmanager
    def fixed(self, pages: int) -> Iterator[None]:
        """Let the shapes of all tensors that one token of every row meets follow from two numbers.

        They are the number of rows, and that of ``pages``, not less than ``pages_to_list()``. What the tokens need must
        have been taken ahead.
        """
        yield

    @abstractmethod
    def bytes_to_select(self, indices: Tensor) -> int:
        """Bytes by which ``select_rows(indices)`` grows the store; 0 where it shrinks."""

    @abstractmethod
    def bytes_to_join(self, other: Self) -> int:
        """Bytes by which ``join(other)`` grows the store."""

    def bytes_to_restore(self, row: int, snapshot: RowSnapshot) -> int:
        """Bytes by which ``restore_row`` grows the store."""
        return 0

    def bytes_to_copy(self, source: int, target: int) -> int:
        """Bytes by which ``copy_row`` grows the store."""
        return 0

    def form(self) -> object:
        """What must be equal where rows go from one store to another."""
        return type(self)

    def _require(self, num_bytes: int) -> None:
        """Ask the budget before anything changes.

        Raises:
            CacheFullError: It does not allow so many bytes more.
        """
        if self.placement.budget is not None and num_bytes > 0:
            self.placement.budget.require(num_bytes, "new tokens or rows")

    def free_bytes(self) -> int:
        """Allocated bytes that hold nothing at present."""
        return 0

    def reserved_bytes(self) -> int:
        """Bytes that are reserved for pages and rows, whoever has them; ``num_bytes`` counts those that are taken."""
        return 0

    def num_bytes(self) -> int:
        """Bytes allocated, free pages included; a storage counts once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.tensors()}
        return sum(storage.nbytes() for storage in storages.values())

    def reset(self) -> None:
        """Drop every row and give the memory back."""
        self.select_rows(torch.zeros(0, dtype=torch.long, device=self.placement.device))


def peak_growth(growth: Sequence[int], pairs: Sequence[tuple[RowStore, RowStore]]) -> int:
    """The most bytes by which two caches grow together while one store after the other moves, if each grows so much."""
    most, now = 0, 0
    for bytes_more, (_, theirs) in zip(growth, pairs, strict=True):
        most = max(most, now + bytes_more)
        now += bytes_more - theirs.num_bytes()
    return most
