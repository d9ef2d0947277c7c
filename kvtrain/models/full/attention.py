"""Plain causal attention on kvtrain's kernels and pages."""

from typing import Any

from torch import Tensor

from kvtrain.cache.base import KVCache
from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.attention import HostAttention, parallel_documents
from kvtrain.models.full.cache import FullCacheLayer
from kvtrain.models.serving import NewTokens


class FullAttention(HostAttention):
    """The host's attention, unchanged in what it computes."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        new_tokens: NewTokens | None = None,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend within the input, and over the cache where there is one.

        Args:
            hidden_states: ``(B, T, hidden)``.
            position_embeddings: Cosines and sines ``(B, T, D)``.
            attention_mask: ``(B, T)`` padding mask, without a cache.
            past_key_values: The model's cache.
            new_tokens: What of the input is real, with a cache.
            document_ids: ``(B, T)``, without a cache.
        """
        query, key = self.normalise(
            self.split_heads(self.q_proj(hidden_states)), self.split_heads(self.k_proj(hidden_states))
        )
        value = self.split_heads(self.v_proj(hidden_states))
        query, key = (apply_rotary(heads, *position_embeddings, halves_repeat=True) for heads in (query, key))
        if past_key_values is None:
            documents = parallel_documents(document_ids, attention_mask)
            output, _lse = attention(
                query, key, value, query_documents=documents, key_documents=documents, scale=self.scaling
            )
        else:
            layer = past_key_values.layers[self.layer_idx]
            assert isinstance(layer, FullCacheLayer) and new_tokens is not None
            output = self._serve(query, key, value, new_tokens.valid, layer)
        return self.project_out(output), None

    def _serve(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, layer: FullCacheLayer) -> Tensor:
        """New tokens, one or many, over the slots before them."""
        if query.shape[2] == 1:
            layer.append(key, value, valid)
            return self.attend_pages(query, layer.pages)[0]
        documents = valid.long()
        parts = [attention(query, key, value, query_documents=documents, key_documents=documents, scale=self.scaling)]
        if layer.pages.table.shape[2]:
            parts.append(self.attend_pages(query, layer.pages))
        layer.append(key, value, valid)
        return merge_attention(parts)[0] if len(parts) > 1 else parts[0][0]
