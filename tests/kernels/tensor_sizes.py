"""A spy on every tensor that any operation gives, forward or backward."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorSizes(TorchDispatchMode):
    """Collects element counts: ``with TensorSizes() as sizes: ...; max(sizes)``."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __enter__(self) -> list[int]:
        super().__enter__()
        return self.sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.sizes.extend(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result
