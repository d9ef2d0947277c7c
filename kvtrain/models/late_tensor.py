"""Tensors that are put together when they are used."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LateTensor(Tensor):
    """Parts that lie in files, put together anew for every operation, of which nothing is kept.

    What reads its own part of a weight thus holds one whole weight for a moment, and not those of all layers.
    """

    parts: Sequence[Sequence[Tensor]]

    @classmethod
    def stack(cls, *parts: Sequence[Tensor]) -> "LateTensor":
        """``(experts, sum of rows, columns)``: a matrix for every expert, of one from each of the ``parts``.

        Args:
            *parts: ``(rows, columns)`` of every expert.
        """
        rows, first = sum(part[0].shape[0] for part in parts), parts[0][0]
        size = (len(parts[0]), rows, first.shape[1])
        late: LateTensor = cls._make_wrapper_subclass(cls, size, dtype=first.dtype)
        late.parts = parts
        return late

    def whole(self) -> Tensor:
        """An ordinary tensor."""
        return torch.stack([torch.cat(one) for one in zip(*self.parts, strict=True)])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself leaves out what is empty
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on whole tensors."""
        args, kwargs = tree_map_only(LateTensor, LateTensor.whole, (args, kwargs or {}))
        return func(*args, **kwargs)
