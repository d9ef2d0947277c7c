"""What the tests of quantized pages share: reading in pieces, and packing once."""

import torch

from kvtrain.kernels.quantization import dequantize, quantize


def read(model, ids, sizes, cache=None, **options):
    """Logits of all tokens, so many at a time, and the cache."""
    cache = cache or model.make_cache(**options)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1), cache


def packed_once(states, bits):
    return dequantize(quantize(states, bits), bits, states.shape[-1], states.dtype)


def packing(monkeypatch, model, bits):
    """The model, whose keys and values are packed once, right after they are made."""
    for layer in model.model.layers:
        project = layer.self_attn.project

        def packed(*args, project=project):
            query, key, value = project(*args)
            return query, packed_once(key, bits), packed_once(value, bits)

        monkeypatch.setattr(layer.self_attn, "project", packed)
    return model
