"""The door to a decoder: every forward pass gets its positions, and the cache that fits, checked before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils.generic import ModelOutput

from kvtrain.cache.base import KVCache, KVCacheLayer
from kvtrain.models.compat import CACHE, NEWEST_TESTED, OLDEST_TESTED, rename_cache

_POSITIONAL = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache")


@dataclass(frozen=True)
class NewTokens:
    """What attention modules must know of the tokens that enter a cache, and the cache itself.

    It comes to them by this name whatever transformers calls a cache.

    Attributes:
        cache: The model's.
        valid: ``(B, n)`` real tokens; in every row the padding stands before them.
        restore: ``(B, n)`` order in which the caller sent them, or None where that is this one.
        visited: Layers of the cache that attention has asked for.
    """

    cache: KVCache
    valid: Tensor
    restore: Tensor | None
    visited: set[int] = field(default_factory=set)

    def layer(self, layer_idx: int) -> KVCacheLayer:
        """The cache of one layer."""
        self.visited.add(layer_idx)
        return self.cache.layers[layer_idx]

    def layers(self) -> list[KVCacheLayer]:
        """The cache of all layers, for stacks that read it as a whole."""
        self.visited.update(range(len(self.cache.layers)))
        return self.cache.layers


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments by name."""
    named = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    rename_cache(named)
    return named


def packed_documents(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Documents ``(B, T)`` of a forward pass whose rows are packed, 0 for padding; None where they are not.

    Callers say so by ``document_ids``, by flash-attention's ``cu_seq_lens_q`` (rows laid end to end) or, as everywhere
    in transformers, by ``position_ids``: a position of 0 after a row's first real token begins a document.

    Args:
        kwargs: The decoder's arguments.
    """
    documents: Tensor | None = kwargs.get("document_ids")
    positions: Tensor | None = kwargs.get("position_ids")
    mask, edges = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    if documents is None and positions is not None:
        starts = _document_starts(positions, mask)
        documents = 1 + starts.cumsum(-1) if bool(starts.any()) else None
    elif documents is None and edges is not None:
        tokens = torch.arange(int(edges[-1]), device=edges.device)
        documents = 1 + torch.bucketize(tokens, edges[1:], right=True)[None]
    if documents is None:
        return None
    documents = documents.expand(_tokens(kwargs).shape[:2])
    return documents if mask is None else documents * mask.to(documents.dtype)


def _tokens(kwargs: Mapping[str, Any]) -> Tensor:
    """The input, ``(B, n)`` or ``(B, n, hidden)``."""
    tokens: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    return tokens


def _document_starts(position_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``(B, n)`` at which a document begins inside its row, given its real tokens ``(B, n)``."""
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.bool()
    return (position_ids == 0) & real & (real.cumsum(-1) > 1)


def check_cache(cache: Any, training: bool) -> None:
    """Refuse caches that cannot be honoured.

    Raises:
        ValueError: A foreign cache, or a cache together with training.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"{type(cache).__name__} does not fit this model; use model.make_cache(), or none")
    if training:
        raise ValueError("training has no cache; call model.eval() or pass use_cache=False")


def parallel_positions(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Positions ``(B, T)`` within each row's real tokens, or within its documents; None is the host's default."""
    if document_ids is not None:
        index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return index - torch.where(starts, index, 0).cummax(1).values
    return None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def enter_parallel(kwargs: dict[str, Any], documents: Tensor | None) -> None:
    """Fill in what a forward pass without a cache needs, in place.

    Args:
        kwargs: The decoder's arguments.
        documents: What ``packed_documents`` found among them; they know of padding, too.
    """
    if documents is not None:
        kwargs.update(document_ids=documents, attention_mask=None)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = parallel_positions(kwargs.get("attention_mask"), documents)


def enter_cache(kwargs: dict[str, Any], cache: KVCache) -> None:
    """Fill in what a forward pass over a cache needs, in place.

    Args:
        kwargs: The decoder's arguments. ``attention_mask (B, past + n)`` may also cover the new tokens alone.
        cache: Its cache.

    Raises:
        ValueError: Rows or mask do not fit, or rows are packed.
        CacheFullError: The new tokens may not fit into the budget.
    """
    tokens = _tokens(kwargs)
    batch, length = tokens.shape[:2]
    valid = _valid_tokens(kwargs.get("attention_mask"), batch, length, tokens.device)
    positions, packed = kwargs.get("position_ids"), kwargs.get("document_ids") is not None
    if packed or (length > 1 and positions is not None and bool(_document_starts(positions, valid).any())):
        raise ValueError(
            "packed rows (document_ids, or a position of 0 inside a row) have no cache; "
            "pass one document a row, or use_cache=False"
        )
    cache.prepare(batch, length)
    if positions is None:
        positions = (cache.tokens[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
    kwargs.update(attention_mask=None, position_ids=positions, new_tokens=NewTokens(cache, valid, None))
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        _padding_first(kwargs, valid)


def leave_cache(output: Any, new: NewTokens) -> Any:
    """Count the tokens that went in, and give the outputs back in the caller's order.

    Raises:
        RuntimeError: No layer has looked at the cache.
    """
    if not new.visited:
        raise RuntimeError(
            f"transformers {transformers.__version__} did not hand the cache to any layer, and what came out is wrong; "
            f"install transformers {OLDEST_TESTED} to {NEWEST_TESTED}, or pass use_cache=False"
        )
    new.cache.advance(new.valid)
    return output if new.restore is None else _reorder(output, new.restore)


def _reorder(output: Any, order: Tensor) -> Any:
    """Every tensor ``(B, n, ...)`` of a decoder's output in the order ``(B, n)``."""
    if isinstance(output, Tensor):
        return _take(output, order)
    if isinstance(output, tuple):
        return tuple(_reorder(part, order) for part in output)
    if isinstance(output, ModelOutput):
        for name, part in output.items():
            output[name] = _reorder(part, order)
    return output


def _valid_tokens(attention_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Which of the new tokens are real, ``(B, n)`` bool."""
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; pass the padding mask (rows, past + new tokens), "
            f"of {batch} rows and at least {length} columns"
        )
    return attention_mask[:, -length:].bool()


def _padding_first(kwargs: dict[str, Any], valid: Tensor) -> None:
    """Move padding that stands between or behind real tokens to the front, so that no cache needs to know of it."""
    order = valid.to(torch.int8).argsort(dim=1, stable=True)
    new: NewTokens = kwargs["new_tokens"]
    kwargs["new_tokens"] = replace(new, valid=valid.gather(1, order), restore=order.argsort(1))
    kwargs["position_ids"] = kwargs["position_ids"].expand(valid.shape).gather(1, order)
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            kwargs[name] = _take(kwargs[name], order)


def _take(tensor: Tensor, order: Tensor) -> Tensor:
    """``(B, n, ...)`` in the order ``(B, n)``."""
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return tensor[rows, order]
