"""The FlexAttention backend of ``kernels.attention``: torch compiles mask and key bias into a Triton kernel, on CUDA.

The mask is said twice: element by element, and by blocks of 128 x 128, which the kernel skips (no pair is visible)
or runs without a mask (all are). What the blocks say follows from their corners and from the range of their document
ids, so no ``[T, T]`` is built; a block of which this cannot tell is masked element by element.

The first call of a kind compiles for its own shapes, the second kind of shapes compiles once more, for all of them.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvtrain.kernels.attention_mask import AttentionMask, biased_pairs, visible_pairs
from kvtrain.kernels.dispatch import at_least_float32

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128
_MIN_CHANNELS = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Kinds of masks, dtypes, one row or many, with and without gradients: each is a compilation of its own.
_COMPILATIONS = 128


def flex_can_run(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this call fits: on CUDA, queries and keys the same tokens, a block of them at least."""
    return (
        _on_gpu(query)
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-2] == key.shape[-2] >= _BLOCK
        and min(query.shape[-1], value.shape[-1]) >= _MIN_CHANNELS
        and query.numel() > 0
    )


def _on_gpu(tensor: Tensor) -> bool:
    """Elsewhere FlexAttention has no backward pass."""
    return tensor.is_cuda


def flex_attend(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, mask: AttentionMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, both differentiable, as ``kernels.attention`` says."""
    from torch.nn.attention.flex_attention import AuxRequest

    biased = None
    if key_bias is not None:
        bias = at_least_float32(key_bias).repeat_interleave(query.shape[1] // key.shape[1], 1)
        biased = _score_mod(_Captured.apply(bias), mask)  # type: ignore[no-untyped-call]
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
        output, aux = _compiled()(
            query,
            key,
            value,
            score_mod=biased,
            block_mask=block_mask(mask, query.shape[-2], query.device),
            scale=scale,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
    return output, aux.lse


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


class _Captured(torch.autograd.Function):
    """A copy of what a score function captures: torch 2.13 silently drops the gradient of captured views."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return bias.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor:
        if grad is None:
            raise RuntimeError("FlexAttention lost the gradient of the key bias; use backend='chunked'")
        return grad


def _score_mod(bias: Tensor, mask: AttentionMask) -> Callable[..., Tensor]:
    """Adds ``bias (B, H, T)`` to the scores of each key, where it counts."""
    plain = mask._replace(documents=None, sinks=None)

    def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        total = score + bias[batch, head, column]
        return torch.where(biased_pairs(row, column, plain), total, score) if plain.bias_after else total

    return biased


def _mask_mod(mask: AttentionMask) -> Callable[..., Tensor]:
    """Which pairs are visible, element by element."""
    documents, plain = mask.documents, mask._replace(documents=None, sinks=None)
    queries, keys = (None, None) if documents is None else map(_for_training, (documents.queries, documents.keys))
    sinks = None if mask.sinks is None else _for_training(mask.sinks)

    def visible(batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        pair = visible_pairs(row, column, plain, None if sinks is None else sinks[batch, column])
        return pair if queries is None or keys is None else pair & (queries[batch, row] == keys[batch, column])

    return visible


def _for_training(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that may be saved for a backward pass, which one made under inference mode may not."""
    return tensor.clone() if tensor.is_inference() else tensor


def block_mask(mask: AttentionMask, length: int, device: torch.device) -> "BlockMask | None":
    """What FlexAttention wants to know of a mask over ``length`` tokens; None where everything is visible."""
    # Where the bias counts is no business of blocks, and without a window nothing is beyond it.
    mask = mask._replace(bias_after=0, sinks=None if mask.window is None else mask.sinks)
    if mask.documents is not None:
        name = ("block mask", mask._replace(documents=None), length, device)
        return mask.documents.keep(name, lambda: _build(mask, length, device))
    if mask.sinks is not None:
        return _build(mask, length, device)
    return _positional(mask, length, device) if mask.causal else None


@functools.lru_cache(maxsize=32)
def _positional(mask: AttentionMask, length: int, device: torch.device) -> "BlockMask":
    """Positions alone decide: one mask for all layers and steps, those of inference and of training alike."""
    with torch.inference_mode(False):
        return _build(mask, length, device)


def _build(mask: AttentionMask, length: int, device: torch.device) -> "BlockMask":
    from torch.nn.attention.flex_attention import BlockMask

    some, every = _visible_blocks(mask, length, device)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_mask_mod(mask),
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``(B, 1, n)`` and indices ``(B, 1, n, n)`` of the key blocks that each query block sees, in order."""
    chosen = blocks.unsqueeze(1).int()
    return chosen.sum(-1).int(), chosen.argsort(dim=-1, descending=True, stable=True).int()


def _visible_blocks(mask: AttentionMask, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks with perhaps a visible pair, and blocks that surely show all of theirs, each ``(B or 1, n, n)``."""
    first = torch.arange(0, length, _BLOCK, device=device)
    last = (first + _BLOCK - 1).clamp(max=length - 1)
    # The corner that sees most, the latest query and the earliest key, and the one that sees least; a window turns
    # them around.
    some, every = _corners(first, last, mask), _corners(last, first, mask)
    whole = first + _BLOCK <= length
    every = every & whole[:, None] & whole
    some, every = some[None], every[None]
    if mask.sinks is not None and mask.window is not None:
        held = _in_blocks(mask.sinks).any(-1)[:, None]  # (B, 1, n), masked element by element
        some = some | (held & _corners(first, last, mask._replace(window=None)))
    if mask.documents is None:
        return some, every.expand_as(some)
    query_low, query_high = _document_range(mask.documents.queries)
    key_low, key_high = _document_range(mask.documents.keys)
    overlap = (query_low[:, :, None] <= key_high[:, None]) & (key_low[:, None] <= query_high[:, :, None])
    single = (query_low == query_high)[:, :, None] & (key_low == key_high)[:, None]
    return some & overlap, every & overlap & single


def _corners(local: Tensor, remote: Tensor, mask: AttentionMask) -> Tensor:
    """Causality at the pair (far query, near key), the window at (near query, far key), ``(n, n)``."""
    if not mask.causal:
        return torch.ones(len(local), len(local), dtype=torch.bool, device=local.device)
    seen = visible_pairs(remote[:, None], local, mask._replace(window=None))
    if mask.window is not None:
        seen = seen & ((local[:, None] - remote < mask.window) | (local < mask.sink))
    return seen


def _document_range(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest id of each block, ``(B, n)``."""
    low, high = _in_blocks(documents).aminmax(dim=-1)
    return low, high


def _in_blocks(tokens: Tensor) -> Tensor:
    """``(B, T)`` to ``(B, n, 128)``, the last token repeated."""
    length = tokens.shape[1]
    places = torch.arange(-(-length // _BLOCK) * _BLOCK, device=tokens.device).clamp(max=length - 1)
    blocks: Tensor = tokens[:, places].unflatten(1, (-1, _BLOCK))
    return blocks
