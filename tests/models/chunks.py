"""Texts fed through a cache in pieces."""

import torch


def run_chunks(model, ids, sizes, attention_mask=None):
    """Feed ``ids`` in chunks of the given sizes through one cache; logits of all, and the cache."""
    cache, logits, begin = model.make_cache(), [], 0
    for size in sizes:
        end = begin + size
        mask = None if attention_mask is None else attention_mask[:, :end]
        logits.append(model(ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits)
        begin = end
    assert begin == ids.shape[1]
    return torch.cat(logits, 1), cache
