"""What a row takes in a cache of half precision, known before there is a model."""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig

from kvtrain.cache.base import KVCache
from kvtrain.cache.rows import Placement
from kvtrain.models.hosts import key_value_shapes, windows
from kvtrain.models.method import Method
from kvtrain.models.registry import builder
from kvtrain.models.sliding import cache_layers

KV_DTYPE = torch.bfloat16  # caches are served in half precision
_PAGES_AFTER = 512  # tokens behind a break-even in which the next page may be taken


def host_kv_bytes(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of the keys and values of a row that the host itself looks at: all of them, or those in layers' windows.

    Args:
        config: The host.
        tokens: Of the row.
    """
    sliding = windows(config)
    return sum(
        2 * heads * head_dim * KV_DTYPE.itemsize * min(tokens, sliding.get(layer, tokens))
        for layer, (heads, head_dim) in enumerate(key_value_shapes(config))
    )


def cache_bytes(config: PreTrainedConfig, method: Method, tokens: int) -> int:
    """Bytes that a row takes in a method's cache, every head taken to keep as many of its tokens.

    Args:
        config: The host.
        method: Its ``expected_slots`` says how many of them a head keeps.
        tokens: Of the row.
    """
    return row_bytes(config, method)(tokens)


def break_even(config: PreTrainedConfig, method: Method, most: int) -> int | None:
    """The length from which on a row takes no more than the host's own cache: pages are taken whole, and tables cost.

    Args:
        config: The host.
        method: As ``cache_bytes`` takes it.
        most: The longest row that is looked at.

    Returns:
        Tokens; None where the row still takes more at ``most``.
    """
    taken_after, host = row_bytes(config, method), partial(host_kv_bytes, config)
    least, tokens = 1, 1
    while tokens <= min(most, least + _PAGES_AFTER):
        taken = taken_after(tokens)
        if taken > host(tokens):
            # A longer row takes no less, so that all are above until the host's cache has come up.
            least = tokens = tokens + 1 + bisect_left(range(tokens + 1, most + 1), taken, key=host)
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
    served, sliding = method.as_served(config), windows(config)
    layers = cache_layers(builder(served, config), [Placement(dtype)] * config.num_hidden_layers)
    stores = KVCache(layers).stores
    in_windows = {store for layer in sliding for store in layers[layer].stores}  # which keep every token of theirs

    def taken(tokens: int) -> int:
        slots = math.ceil(method.expected_slots(tokens))
        return sum(store.bytes_for(tokens if store in in_windows else slots, 1) for store in stores)

    return taken
