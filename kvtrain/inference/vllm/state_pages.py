"""Rows of constant state in vLLM's pages: brought together for a step's requests, and written back."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from kvtrain.inference.vllm.state_layout import StateLayout


@dataclass(frozen=True)
class Requests:
    """Requests of a step that have equally many new tokens.

    Attributes:
        index: ``(B,)`` which of the step's requests they are.
        tokens: ``(B, n)`` which of the step's tokens are theirs.
        past: ``(B,)`` tokens that each has seen before.
    """

    index: Tensor
    tokens: Tensor
    past: Tensor


def requests_of(step: LinearAttentionMetadata) -> list[Requests]:
    """The requests of a step, those that decode as one group: it takes no question to the device.

    What ``seq_lens`` counts behind the last request is padding.
    """
    device = step.seq_lens.device
    if not step.num_prefills:
        index = torch.arange(step.num_decodes, device=device)
        return [Requests(index, index[:, None], step.seq_lens[: step.num_decodes].long() - 1)]
    starts = step.query_start_loc.tolist()
    groups: dict[int, list[int]] = {}
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            groups.setdefault(end - start, []).append(request)
    found = []
    for length, members in groups.items():
        index = torch.tensor(members, device=device)
        first = torch.tensor([starts[request] for request in members], device=device)
        tokens = first[:, None] + torch.arange(length, device=device)
        found.append(Requests(index, tokens, step.seq_lens[index].long() - length))
    return found


class Page(MambaBase):
    """Bytes of a request; vLLM gives it a page of them, which it neither reads nor clears.

    Args:
        num_bytes: Of a page.
        name: By which vLLM knows it, with the number of one layer in it.
    """

    def __init__(self, num_bytes: int, name: str) -> None:
        self.num_bytes, self.name = num_bytes, name
        self.kv_cache: tuple[Tensor, ...] = ()
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert name not in layers, f"two layers are called {name}"
        layers[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """See vLLM's."""
        return ((self.num_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """See vLLM's."""
        return (torch.uint8,)

    @property
    def words(self) -> Tensor:
        """All pages, ``(N, num_bytes / 8)``: copied eight bytes at a time."""
        return self.kv_cache[0].view(torch.int64)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """See vLLM's; its metadata is what ``requests_of`` reads."""
        return MambaAttentionBackendEnum.LINEAR


class StatePages:
    """Stores whose rows lie in pages of vLLM's.

    Args:
        layout: Of the stores.
        name: Of the state, with the number of one layer in it.
    """

    def __init__(self, layout: StateLayout, name: str) -> None:
        self.layout = layout
        self.pages = [Page(layout.piece_bytes, f"{name}{number or ''}") for number in range(layout.num_pages)]

    def run(self, step: Callable[[Requests], Tensor], output: Tensor) -> bool:
        """Run a step's requests, group by group, each with its rows in the stores.

        Args:
            step: From requests to their part of the output, ``(B, n, ...)``; it changes the stores.
            output: ``(T, ...)`` of the step's tokens, which is written.

        Returns:
            Whether there is a step: without, vLLM measures how much memory the model takes.
        """
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            return False
        for requests in _kept(metadata[self.pages[0].name]):
            slots = [metadata[page.name].state_indices_tensor[requests.index].long() for page in self.pages]
            pieces = [page.words.index_select(0, slot) for page, slot in zip(self.pages, slots, strict=True)]
            rows = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
            self.layout.open(rows.view(torch.uint8), requests.past)
            output[requests.tokens] = step(requests)
            width = rows.shape[1] // len(pieces)
            for page, slot, piece in zip(self.pages, slots, rows.split(width, 1), strict=True):
                page.words.index_copy_(0, slot, piece)
        return True


def _kept(step: Any) -> Iterator[Requests]:
    """``requests_of`` a step, found once for all layers that have these metadata."""
    if not hasattr(step, "kvtrain_requests"):
        step.kvtrain_requests = requests_of(step)
    return iter(step.kvtrain_requests)
