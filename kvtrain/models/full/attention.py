"""Plain causal attention on kvtrain's kernels and pages."""

from typing import Any

from torch import Tensor, nn

from kvtrain.cache.rows import bookkeeping
from kvtrain.kernels.attention import attention
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.quantization import read_back
from kvtrain.models.attention import HostAttention, parallel_documents
from kvtrain.models.full.cache import FullCacheLayer
from kvtrain.models.serving import NewTokens


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
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        new_tokens: NewTokens | None = None,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend within the input, and over the cache where there is one.

        Args:
            hidden_states: ``(B, T, hidden)``.
            position_embeddings: Cosines and sines ``(B, T, D)``.
            attention_mask: ``(B, T)`` padding mask, without a cache.
            new_tokens: What of the input is real, and the cache it enters; None without a cache.
            document_ids: ``(B, T)``, without a cache.
        """
        query, key, value = self.project(hidden_states, position_embeddings)
        if new_tokens is None:
            documents = parallel_documents(document_ids, attention_mask)
            bits = None if self.training else self.bits
            key, value = read_back(key, bits), read_back(value, bits)
            output, _lse = attention(query, key, value, documents=Documents.of(documents), scale=self.scaling)
        else:
            layer = new_tokens.layer(self.layer_idx)
            assert isinstance(layer, FullCacheLayer)
            output = self._serve(query, key, value, new_tokens.valid, layer)
        return self.project_out(output), None

    @bookkeeping
    def _serve(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, layer: FullCacheLayer) -> Tensor:
        """New tokens, one or many, over the slots before them."""
        if query.shape[2] == 1:
            layer.append(key, value, valid)
            return self.attend_pages(query, layer.pages)[0]
        read = read_back(key, self.bits), read_back(value, self.bits)
        output = self.attend_pages_and_new(query, *read, valid, layer.pages)
        layer.append(key, value, valid)
        return output
