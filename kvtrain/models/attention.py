"""What every method's attention shares: the host's projections, and who may look at whom."""

from typing import Any

from torch import Tensor, nn

from kvtrain.cache.paged import PagedStore
from kvtrain.kernels.attention import add_sinks, attention, merge_attention
from kvtrain.kernels.context_parallel import WHOLE_ROWS, ContextParallel
from kvtrain.kernels.paged_attention import goes_by_pages, paged_attention
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.context import ForwardContext
from kvtrain.models.hosts import host_adapter

Angles = tuple[Tensor, Tensor]  # cosines and sines (B, T, D)


class HostAttention(nn.Module):
    """Owns a host attention's children under their own names; methods subclass it and write ``forward``.

    ``forward(hidden_states, position_embeddings, context, **_)`` gets ``(B, T, hidden)``, the angles ``(B, T, D)`` and
    the pass' ``ForwardContext``, attends within the input, and over the cache where there is one, and returns
    ``(B, T, hidden)`` and None. Where ranks share rows, between ``project`` and ``project_out`` lie whole rows of the
    heads in ``context.parallel.own_heads(num_heads)``: take from there what belongs to a head, and ask
    ``context.parallel.all_heads`` for what looks at all of them. What queries have found among all their keys goes
    ``with_sinks`` before it goes on.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module  # of some families
    k_norm: nn.Module
    sinks: nn.Parameter | None

    def __init__(self, host_attention: nn.Module, layer_idx: int) -> None:
        super().__init__()
        for name, child in host_attention.named_children():
            self.add_module(name, child)
        self.register_parameter("sinks", getattr(host_attention, "sinks", None))
        config: Any = host_attention.config
        adapter = host_adapter(config)
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = int(config.num_attention_heads)
        self.num_key_value_heads, self.head_dim = adapter.key_value_shape(config, layer_idx)
        self.query_key_norm = adapter.query_key_norm
        self.num_groups = self.num_heads // self.num_key_value_heads
        self.scaling = float(host_attention.scaling)  # type: ignore[arg-type]

    def mixing_flops(self, sequence_length: int) -> int:
        """Operations of one token beside the projections: queries with keys, weights with values, half of each."""
        return 2 * 2 * self.num_heads * self.head_dim * sequence_length // 2

    def split_heads(self, projected: Tensor) -> Tensor:
        """``(B, T, heads * D)`` to ``(B, heads, T, D)``."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the host's norms, where it has them, to queries ``(B, H, T, D)`` and keys ``(B, H_kv, T, D)``."""
        return self.norm_heads("q_norm", query), self.norm_heads("k_norm", key)

    def norm_heads(self, name: str, heads: Tensor) -> Tensor:
        """Apply one of the host's norms, where it has them, to ``(B, heads, T, D)``: by head, or all at once."""
        if self.query_key_norm is None:
            return heads
        norm = getattr(self, name)
        normed: Tensor
        if self.query_key_norm == "head":
            normed = norm(heads)
            return normed
        normed = norm(heads.transpose(1, 2).flatten(2))
        return self.split_heads(normed)

    def project(
        self, hidden_states: Tensor, angles: Angles, parallel: ContextParallel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``(B, H, T, D)`` and keys ``(B, H_kv, T, D)``, and values, as the host makes them.

        Where ranks share rows these are whole rows, of the rank's own heads.

        Args:
            hidden_states: ``(B, T, hidden)``, of own tokens.
            angles: Cosines and sines ``(B, T, D)``, of all tokens.
            parallel: Ranks that share the rows.
        """
        query, key = self.normalize(
            self.split_heads(self.q_proj(hidden_states)), self.split_heads(self.k_proj(hidden_states))
        )
        query, key, value = parallel.to_heads(query, key, self.split_heads(self.v_proj(hidden_states)))
        query, key = (apply_rotary(heads, *angles, halves_repeat=True) for heads in (query, key))
        return query, key, value

    def attend_documents(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext) -> Tensor:
        """Every token over all before it in its document, without a cache, ``(B, H, T, D)``."""
        attended = attention(query, key, value, documents=context.documents, scale=self.scaling)
        return self.with_sinks(attended, context.parallel)[0]

    def with_sinks(
        self, attended: tuple[Tensor, Tensor], parallel: ContextParallel = WHOLE_ROWS
    ) -> tuple[Tensor, Tensor]:
        """What queries see of all their keys, and of their head's learned sink, where the host's family has sinks.

        Args:
            attended: Output ``(B, H, T, D)`` and log-sum-exp ``(B, H, T)``.
            parallel: Ranks that share the rows: these are of own heads.

        Returns:
            Such a pair.
        """
        if self.sinks is None:
            return attended
        return add_sinks(attended, self.sinks[parallel.own_heads(self.num_heads)])

    def attend_pages(
        self,
        query: Tensor,
        pages: PagedStore,
        lengths: Tensor | None = None,
        heads: slice | None = None,
        names: tuple[str, str] = ("keys", "values"),
    ) -> tuple[Tensor, Tensor]:
        """Let every query ``(B, H, n, D)`` see the first ``lengths (B, H_kv)`` slots of its head, all by default.

        Args:
            query: Of the key-value heads in ``heads``.
            pages: The store.
            lengths: Visible slots of all its heads.
            heads: Those that are attended; None: all.
            names: Of keys and values in the store.
        """
        lengths = pages.lengths if lengths is None else lengths
        table, layout = pages.table, None
        if heads is not None:
            table, lengths = table[:, heads], lengths[:, heads]
        elif goes_by_pages(query, table, pages.page_size * pages.slot_tokens):
            layout = pages.layout()
        if pages.slot_tokens > 1:
            lengths = lengths * pages.slot_tokens
        keys, values = (pages.pool.slots[name] for name in names)
        return paged_attention(query, keys, values, table, lengths, self.scaling, codec=pages.codec, layout=layout)

    def attend_pages_and_new(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: ForwardContext,
        pages: PagedStore,
        lengths: Tensor | None = None,
        heads: slice | None = None,
        names: tuple[str, str] = ("keys", "values"),
    ) -> tuple[Tensor, Tensor]:
        """Several new tokens over themselves and over all that some heads, all by default, hold before them.

        Args:
            query: ``(B, H, n, D)``, of the key-value heads in ``heads``.
            key: ``(B, H_kv, n, D)``, likewise.
            value: ``(B, H_kv, n, D)``, likewise.
            context: Of the pass.
            pages: The store.
            lengths: Slots before the new tokens ``(B, H_kv)`` of all its heads; all that it holds by default.
            heads: Those that are attended; None: all.
            names: Of keys and values in the store.

        Returns:
            Output ``(B, H, n, D)`` and log-sum-exp ``(B, H, n)``.
        """
        parts = [attention(query, key, value, documents=context.entering(), scale=self.scaling)]
        if pages.table.shape[2]:
            parts.append(self.attend_pages(query, pages, lengths, heads, names))
        return merge_attention(parts) if len(parts) > 1 else parts[0]

    def project_out(self, output: Tensor, parallel: ContextParallel) -> Tensor:
        """``(B, H, T, D)`` to ``(B, T, hidden)``; where ranks share rows, from own heads to own tokens."""
        merged: Tensor = self.o_proj(parallel.to_tokens(output).transpose(1, 2).flatten(2))
        return merged
