"""The door to a decoder: every forward pass gets its positions, and the cache that fits, checked before it starts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtrain.cache.base import KVCache

_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


@dataclass(frozen=True)
class NewTokens:
    """What attention modules must know of the tokens that enter a cache.

    Attributes:
        valid: ``(B, n)`` real tokens; in every row the padding stands before them.
        restore: ``(B, n)`` order in which the caller sent them, or None where that is this one.
    """

    valid: Tensor
    restore: Tensor | None


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments by name."""
    return {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}


def check_cache(cache: Any, training: bool, document_ids: Tensor | None) -> None:
    """Refuse caches that cannot be honoured.

    Raises:
        ValueError: A foreign cache, or a cache together with training or packed documents.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"{type(cache).__name__} does not fit this model; use model.make_cache(), or none")
    if training:
        raise ValueError("training has no cache; call model.eval() or pass use_cache=False")
    if document_ids is not None:
        raise ValueError("packed documents have no cache; pass one document a row, or use_cache=False")


def parallel_positions(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Positions ``(B, T)`` within each row's real tokens, or within its documents; None is the host's default."""
    if document_ids is not None:
        index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return index - torch.where(starts, index, 0).cummax(1).values
    return None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def enter_cache(kwargs: dict[str, Any], cache: KVCache) -> None:
    """Fill in what a forward pass over a cache needs, in place.

    Args:
        kwargs: The decoder's arguments. ``attention_mask (B, past + n)`` may also cover the new tokens alone.
        cache: Its cache.

    Raises:
        ValueError: Rows or mask do not fit.
        CacheFullError: The new tokens may not fit into the budget.
    """
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch, length = tokens.shape[:2]
    valid = _valid_tokens(kwargs.get("attention_mask"), batch, length, tokens.device)
    cache.prepare(batch, length)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (cache.tokens[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
    kwargs.update(attention_mask=None, position_ids=positions, new_tokens=NewTokens(valid, None))
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        _padding_first(kwargs, valid)


def leave_cache(output: Any, cache: KVCache, new: NewTokens) -> Any:
    """Count the tokens that went in, and give the outputs back in the caller's order."""
    cache.advance(new.valid)
    if new.restore is not None:
        output.last_hidden_state = _take(output.last_hidden_state, new.restore)
        if output.hidden_states is not None:
            output.hidden_states = tuple(_take(states, new.restore) for states in output.hidden_states)
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
    kwargs["new_tokens"] = NewTokens(valid.gather(1, order), order.argsort(1))
    kwargs["position_ids"] = kwargs["position_ids"].expand(valid.shape).gather(1, order)
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            kwargs[name] = _take(kwargs[name], order)


def _take(tensor: Tensor, order: Tensor) -> Tensor:
    """``(B, n, ...)`` in the order ``(B, n)``."""
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    return tensor[rows, order]
