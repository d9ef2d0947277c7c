"""What the tests of quantised pages share: reading in pieces, and packing once."""

import torch

from kvtrain.kernels.quantisation import dequantise, quantise


def read(model, ids, sizes, cache=None, **options):
    """Logits of all tokens, so many at a time, and the cache."""
    cache = cache or model.make_cache(**options)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1), cache


def packed_once(states, bits):
    return dequantise(quantise(states, bits), bits, states.shape[-1], states.dtype)
