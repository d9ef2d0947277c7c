"""Attention within the window, in both forms."""

import torch

from kvtrain.kernels.attention import attention
from kvtrain.models.attention import HostAttention


class WindowAttention(HostAttention):
    def __init__(self, host_attention, layer_idx, window):
        super().__init__(host_attention, layer_idx)
        self.window = window

    def forward(self, hidden_states, position_embeddings, context, **_):
        query, key, value = self.project(hidden_states, position_embeddings, context.parallel)
        if context.cache is None:
            seen = {"window": self.window.recent, "sink": self.window.sink}
            output, _lse = attention(query, key, value, documents=context.documents, scale=self.scaling, **seen)
        else:
            ring = context.cache_layer(self.layer_idx).ring
            output = self._serve(query, key, value, context.positions, context.valid, ring)
            ring.write(key, value, context.valid)
        return self.project_out(output, context.parallel), None

    def _serve(self, query, key, value, positions, valid, ring):
        """Dense and plain: the ring beside the new tokens, and who may see whom by position."""
        positions = positions.expand(valid.shape)
        keys, values, held = ring.gather()
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        stored = torch.cat([held, positions.masked_fill(~valid, -1)], 1)[:, None, :]
        age = positions[:, :, None] - stored
        seen = (stored >= 0) & (age >= 0) & ((age < self.window.recent) | (stored < self.window.sink))
        groups = query.shape[1] // keys.shape[1]
        scores = query @ keys.to(query.dtype).repeat_interleave(groups, 1).mT * self.scaling
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num()
        return weights @ values.to(query.dtype).repeat_interleave(groups, 1)
