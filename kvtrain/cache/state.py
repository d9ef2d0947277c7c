"""State of constant size a row: open segments, recurrent states, counters."""

from collections.abc import Mapping
from math import prod
from typing import Self

import torch
from torch import Tensor

from kvtrain.cache.rows import Placement, RowSnapshot, RowStore, bookkeeping

StateShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class StateStore(RowStore):
    """Named tensors ``(B, ...)``, zero for a new row; read and replaced like the items of a dictionary.

    Where the placement reserves memory, they are the first rows of larger ones, whose room doubles when it is used up:
    rows that join or leave cost what they hold, and those behind them what they hold. What replaces a tensor is then
    copied to where that lies, so whoever has read a tensor and keeps it sees what comes later.

    Args:
        shapes: Shape of one row and dtype of every tensor, by name.
        placement: Where tensors lie; dtypes are those of ``shapes``.
    """

    def __init__(self, shapes: StateShapes, placement: Placement) -> None:
        super().__init__(placement)
        self.shapes = dict(shapes)
        self._state = {name: self._empty(name, 0) for name in self.shapes}
        self._memory = None if placement.reserve is None else dict(self._state)  # rows that are here, and room for more
        self._rows = 0
        self._narrowed: tuple[Tensor, dict[str, Tensor]] | None = None  # chosen rows, and the state of all

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    @bookkeeping
    def __setitem__(self, name: str, value: Tensor) -> None:
        """Replace a tensor; ``value`` is the store's from now on, detached, and copied if part of something larger.

        Where memory is reserved it is always copied, unless it lies there already, which costs nothing.

        Raises:
            ValueError: The shape is not that of the state.
        """
        shape, dtype = self.shapes[name]
        if value.shape != (self._rows, *shape):
            raise ValueError(f"state {name!r} is {(self._rows, *shape)}, not {tuple(value.shape)}")
        if self._memory is not None:
            self._state[name].copy_(value.detach())
            return
        value = value.detach().to(dtype)
        if torch.compiler.is_compiling():  # what a graph gives back may be part of something larger
            self._state[name] = value.clone(memory_format=torch.contiguous_format)
            return
        whole = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        self._state[name] = value if whole else value.clone(memory_format=torch.contiguous_format)

    @property
    def num_rows(self) -> int:
        """See ``RowStore``."""
        return self._rows

    def lie_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the rows be those of somebody else's memory, where what replaces a tensor is copied.

        Args:
            tensors: ``(B, ...)`` of every name, with the shapes and dtypes of the state; they are neither copied nor
                cleared, and rows do not join or leave while the store lies in them.
        """
        self._state, self._memory = dict(tensors), dict(tensors)
        self._rows = next(iter(tensors.values())).shape[0]

    def admit(self, count: int) -> None:
        """See ``RowStore``."""
        self._append({name: self._empty(name, count) for name in self.shapes}, count)

    def select_rows(self, indices: Tensor) -> None:
        """See ``RowStore``."""
        self._require(self.bytes_to_select(indices))
        if self._memory is None:
            self._state = {name: tensor[indices] for name, tensor in self._state.items()}
            self._rows = indices.numel()
            return
        held, rows = dict(self._state), indices.numel()
        stay = int((indices == torch.arange(rows, device=indices.device)).cumprod(0).sum())  # the first rows, in place
        self._have(rows)
        for name, tensor in self._state.items():
            tensor[stay:] = held[name][indices[stay:]]

    def join(self, other: Self) -> None:
        """See ``RowStore``."""
        self._append({name: other[name].to(held) for name, held in self._state.items()}, other.num_rows)

    def snapshot_row(self, row: int) -> RowSnapshot:
        """See ``RowStore``."""
        return {name: tensor[row].clone() for name, tensor in self._state.items()}

    def restore_row(self, row: int, snapshot: RowSnapshot) -> None:
        """See ``RowStore``."""
        for name, tensor in self._state.items():
            tensor[row] = snapshot[name]

    def copy_row(self, source: int, target: int) -> None:
        """See ``RowStore``."""
        for tensor in self._state.values():
            tensor[target] = tensor[source]

    def clear_rows(self, rows: Tensor) -> None:
        """See ``RowStore``."""
        for tensor in self._state.values():
            tensor[rows] = 0

    def row_bytes(self) -> Tensor:
        """See ``RowStore``."""
        return torch.full((self._rows,), self.bytes_for(0, 1), device=self.placement.device)

    def narrow(self, rows: Tensor) -> None:
        """See ``RowStore``."""
        self._narrowed = rows, self._state
        self._state = {name: tensor[rows] for name, tensor in self._state.items()}
        self._rows = rows.numel()

    def widen(self) -> None:
        """See ``RowStore``."""
        assert self._narrowed is not None
        rows, state = self._narrowed
        for name, tensor in state.items():
            tensor[rows] = self._state[name]
        self._state, self._narrowed = state, None
        self._rows = next(iter(state.values())).shape[0]

    def num_bytes(self) -> int:
        """See ``RowStore``; what is reserved for rows counts from when they come."""
        return super().num_bytes() if self._memory is None else sum(tensor.nbytes for tensor in self.tensors())

    def reserved_bytes(self) -> int:
        """See ``RowStore``."""
        return sum(memory.nbytes for memory in (self._memory or {}).values())

    def tensors(self) -> list[Tensor]:
        """See ``RowStore``; while rows are chosen, those of all of them."""
        return list((self._state if self._narrowed is None else self._narrowed[1]).values())

    def bytes_for(self, tokens: int, rows: int = 0) -> int:
        """See ``RowStore``; tokens cost nothing."""
        return rows * sum(prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())

    def bytes_to_select(self, indices: Tensor) -> int:
        """See ``RowStore``."""
        return max(0, self.bytes_for(0, indices.numel() - self._rows))

    def bytes_to_join(self, other: Self) -> int:
        """See ``RowStore``."""
        return self.bytes_for(0, other.num_rows)

    def form(self) -> object:
        """See ``RowStore``."""
        return type(self), self.shapes

    def _append(self, rows: Mapping[str, Tensor], count: int) -> None:
        self._require(self.bytes_for(0, count))
        if self._memory is None:
            self._state = {name: torch.cat([tensor, rows[name]]) for name, tensor in self._state.items()}
            self._rows += count
            return
        before = self._rows
        self._have(before + count)
        for name, tensor in self._state.items():
            tensor[before:] = rows[name]

    def _have(self, rows: int) -> None:
        """Have so many rows of the reserved memory; those that were here stay, new ones hold whatever it held."""
        assert self._memory is not None and self.placement.reserve is not None
        for name, memory in self._memory.items():
            if rows > len(memory):
                room = min(2 * len(memory), self.placement.reserve // max(1, self.bytes_for(0, 1)))
                self._memory[name] = memory.new_empty(max(rows, room), *memory.shape[1:])
                self._memory[name][: self._rows] = self._state[name]
            self._state[name] = self._memory[name][:rows]
        self._rows = rows

    def _empty(self, name: str, rows: int) -> Tensor:
        shape, dtype = self.shapes[name]
        return torch.zeros(rows, *shape, dtype=dtype, device=self.placement.device)
