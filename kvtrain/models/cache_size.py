"""What a row takes in a cache of half precision, known before there is a model."""

import math
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from kvtrain.cache.base import KVCache
from kvtrain.cache.rows import Placement
from kvtrain.models.hosts import key_value_shapes
from kvtrain.models.method import Method
from kvtrain.models.registry import builder

KV_DTYPE = torch.bfloat16  # caches are served in half precision
_PAGES_AFTER = 512  # tokens behind a break-even in which the next page may be taken


def kv_bytes_per_token(config: PreTrainedConfig) -> int:
    """Bytes that a full cache holds for one token: keys and values of every layer and key-value head."""
    return sum(2 * heads * head_dim * KV_DTYPE.itemsize for heads, head_dim in key_value_shapes(config))


def cache_bytes(config: PreTrainedConfig, method: Method, tokens: int) -> int:
    """Bytes that a row takes in a method's cache, every head taken to keep as many of its tokens.

    Args:
        config: The host.
        method: Its ``expected_slots`` says how many of them a head keeps.
        tokens: Of the row.
    """
    return row_bytes(config, method)(tokens)


def break_even(config: PreTrainedConfig, method: Method, most: int) -> int | None:
    """The length from which on a row takes no more than in a full cache: pages are taken whole, and tables cost.

    Args:
        config: The host.
        method: As ``cache_bytes`` takes it.
        most: The longest row that is looked at.

    Returns:
        Tokens; None where the row still takes more at ``most``.
    """
    per_token, taken_after = kv_bytes_per_token(config), row_bytes(config, method)
    least, tokens = 1, 1
    while tokens <= min(most, least + _PAGES_AFTER):
        taken = taken_after(tokens)
        if taken > per_token * tokens:
            # A longer row takes no less, so that all are above until the full cache has come up.
            least = tokens = max(tokens + 1, -(-taken // per_token))
        else:
            tokens += 1
    return least if least <= most else None


def row_bytes(config: PreTrainedConfig, method: Method, dtype: torch.dtype = KV_DTYPE) -> Callable[[int], int]:
    """Bytes of a row by its tokens, as ``cache_bytes``, for many questions.

    Args:
        config: The host.
        method: As ``cache_bytes`` takes it.
        dtype: Of keys and values.
    """
    served = method.as_served(config)
    cache = KVCache(builder(served, config).cache_layers([Placement(dtype)] * config.num_hidden_layers))
    return lambda tokens: cache.bytes_for(math.ceil(method.expected_slots(tokens)), rows=1)
