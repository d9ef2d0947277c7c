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

    Args:
        shapes: Shape of one row and dtype of every tensor, by name.
        placement: Where tensors lie; dtypes are those of ``shapes``.
    """

    def __init__(self, shapes: StateShapes, placement: Placement) -> None:
        super().__init__(placement)
        self.shapes = dict(shapes)
        self._state = {name: self._empty(name, 0) for name in self.shapes}
        self._rows = 0
        self._narrowed: tuple[Tensor, dict[str, Tensor]] | None = None  # chosen rows, and the state of all

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    @bookkeeping
    def __setitem__(self, name: str, value: Tensor) -> None:
        """Replace a tensor; ``value`` is the store's from now on, detached, and copied if part of something larger.

        Raises:
            ValueError: The shape is not that of the state.
        """
        shape, dtype = self.shapes[name]
        if value.shape != (self._rows, *shape):
            raise ValueError(f"state {name!r} is {(self._rows, *shape)}, not {tuple(value.shape)}")
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

    def admit(self, count: int) -> None:
        """See ``RowStore``."""
        self._append({name: self._empty(name, count) for name in self.shapes}, count)

    def select_rows(self, indices: Tensor) -> None:
        """See ``RowStore``."""
        self._require(self.bytes_to_select(indices))
        self._state = {name: tensor[indices] for name, tensor in self._state.items()}
        self._rows = indices.numel()

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

    def _append(self, rows: Mapping[str, Tensor], count: int) -> None:
        self._require(self.bytes_for(0, count))
        self._state = {name: torch.cat([tensor, rows[name]]) for name, tensor in self._state.items()}
        self._rows += count

    def _empty(self, name: str, rows: int) -> Tensor:
        shape, dtype = self.shapes[name]
        return torch.zeros(rows, *shape, dtype=dtype, device=self.placement.device)
