"""Plain causal attention on kvtrain's kernels and pages."""

from typing import Any

from torch import Tensor, nn

from kvtrain.cache.rows import bookkeeping
from kvtrain.kernels.quantization import read_back
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.context import ForwardContext
from kvtrain.models.full_cache import FullCacheLayer


class FullAttention(HostAttention):
    """The host's attention, unchanged in what it computes but for a cache's bits.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        bits: Of a channel, in which every key and value is kept and read, by its own token too; None: as they are.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, bits: int | None = None) -> None:
        super().__init__(host_attention, layer_idx)
        self.bits = bits

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``."""
        query, key, value = self.project(hidden_states, position_embeddings, context.parallel)
        if context.cache is None:
            if self.bits is not None and not self.training:
                key, value = read_back(key, self.bits), read_back(value, self.bits)
            output = self.attend_documents(query, key, value, context)
        else:
            layer = context.cache_layer(self.layer_idx)
            assert isinstance(layer, FullCacheLayer)
            output = self._serve(query, key, value, context, layer)
        return self.project_out(output, context.parallel), None

    @bookkeeping
    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext, layer: FullCacheLayer
    ) -> Tensor:
        """New tokens, one or many, over the slots before them."""
        assert context.cache is not None and context.valid is not None
        past, valid, heads = context.cache.tokens.to(query.device), context.valid, key.shape[1]
        positions = context.keep(("slots", heads), lambda: _by_head(past[:, None] + valid.cumsum(-1) - 1, heads))
        if query.shape[2] == 1:
            layer.write(key, value, positions, None if context.single else _by_head(valid, heads))
            return self.with_sinks(self.attend_pages(query, layer.pages, names=layer.names))[0]
        read = read_back(key, self.bits), read_back(value, self.bits)
        # Layers above have written the new tokens already where they share a store: what was held is said.
        held = context.keep(("held", heads), lambda: _by_head(past, heads))
        attended = self.attend_pages_and_new(query, *read, context, layer.pages, held, names=layer.names)
        layer.write(key, value, positions, _by_head(valid, heads))
        return self.with_sinks(attended)[0]


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """``(B, ...)``, the same for every head: ``(B, H_kv, ...)``."""
    return tensor.unsqueeze(1).expand(-1, heads, *tensor.shape[1:])
