"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3): an all-to-all before attention, one after it."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single

from kvtrain.kernels.context_parallel import ContextParallel


class Ulysses(ContextParallel):
    """A group of ranks that share rows; every rank calls everything but ``own_tokens`` and ``own_heads`` alike.

    Gradients are those of the sum of what the ranks make of their parts.

    Args:
        group: The ranks, which hold parts in their order.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def own_tokens(self, whole: Tensor) -> Tensor:
        """See ``ContextParallel``."""
        length = whole.shape[1]
        if length % self.size:
            raise ValueError(
                f"rows of {length} tokens cannot be shared by {self.size} ranks; give rows whose length they divide"
            )
        return whole.narrow(1, self.rank * (length // self.size), length // self.size)

    def own_heads(self, num_heads: int) -> slice:
        """See ``ContextParallel``."""
        share = num_heads // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def to_heads(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """See ``ContextParallel``; tensors of one width travel together."""
        by_rank = [heads.unflatten(1, (self.size, -1)).movedim(1, 0) for heads in tokens]  # (N, B, H / N, T / N, D)
        shares = [heads.shape[2] for heads in by_rank]
        whole = self._exchange(torch.cat(by_rank, 2)).movedim(0, 2).flatten(2, 3)
        return torch.split(whole, shares, 1)

    def to_tokens(self, heads: Tensor) -> Tensor:
        """See ``ContextParallel``."""
        by_rank = heads.unflatten(2, (self.size, -1)).movedim(2, 0)  # (N, B, H / N, T / N, D)
        return self._exchange(by_rank).movedim(0, 1).flatten(1, 2)

    def all_heads(self, own: Tensor) -> Tensor:
        """See ``ContextParallel``."""
        return self._exchange(own.expand(self.size, *own.shape)).movedim(0, 1).flatten(1, 2)

    def _exchange(self, by_rank: Tensor) -> Tensor:
        """Send ``by_rank[r]`` to rank r; what comes from it stands there, ``(N, ...)``."""
        received: Tensor = _AllToAll.apply(by_rank.contiguous(), self.group)  # type: ignore[no-untyped-call]
        return received


class _AllToAll(torch.autograd.Function):
    """Gradients go the way back, which is the same: what came from rank r goes to rank r.

    torch's own differentiable form hands out a tensor that waits when it is used, which kernels that look at memory by
    themselves do not do.
    """

    @staticmethod
    def forward(ctx: Any, by_rank: Tensor, group: ProcessGroup) -> Tensor:
        """Exchange."""
        ctx.group, received = group, torch.empty_like(by_rank)
        all_to_all_single(received, by_rank, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Exchange."""
        given = gradient.contiguous()
        returned = torch.empty_like(given)
        all_to_all_single(returned, given, group=ctx.group)
        return returned, None
