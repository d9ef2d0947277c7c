"""TransNormer's two kinds of attention (arXiv 2210.10340, section 4)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvtrain.kernels.block_attention import block_attention
from kvtrain.kernels.linear_attention import linear_attention
from kvtrain.kernels.linear_attention_chunked import document_layout
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.context import ForwardContext
from kvtrain.models.linear_state import LinearStateLayer, attend_state
from kvtrain.models.transnormer.cache import DiagCacheLayer
from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.layers import Projection, RelativePosition, make_norm

_DOCUMENT = 1 << 40  # no document has so many blocks,
_PADDING = 1 << 62  # and no row so many documents


@dataclass(frozen=True)
class TokenLayout:
    """Which of the input's tokens belong together; the same for every layer.

    Attributes:
        position_ids: ``(B, T)``, or ``(1, T)`` where all rows have the same.
        document_ids: ``(B, T)``, 0 for padding; None where a row is one document without any.
        aligned: Whether every row begins a block and goes on without a gap.
    """

    position_ids: Tensor
    document_ids: Tensor | None
    aligned: bool

    @classmethod
    def of(cls, context: ForwardContext, rows: int) -> Self:
        """The layout of a pass over so many rows, found once a pass.

        Raises:
            ValueError: A row's tokens are not side by side.
        """
        return context.keep("token layout", lambda: cls._find(context, rows))

    @classmethod
    def _find(cls, context: ForwardContext, rows: int) -> Self:
        positions, aligned = context.positions, context.counted
        documents = None if context.documents is None else context.documents.queries
        if context.single:  # which may begin a block: a ring without tokens shows nothing
            return cls(positions.expand(rows, -1), None, aligned=False)
        if context.valid is not None:
            whole = bool(context.valid.all())
            documents = None if whole else context.valid.long()
            aligned = whole and not bool(positions[:, 0].any())
        elif documents is not None:
            _check_runs(documents)
        return cls(positions if aligned else positions.expand(rows, -1), documents, aligned)

    @property
    def real(self) -> Tensor | None:
        """``(B, T)`` tokens that are none of padding; None where all are."""
        return None if self.document_ids is None else self.document_ids > 0

    def block_ids(self, block_size: int) -> Tensor | None:
        """A number for each token's block ``(B, T)``, not negative; None where blocks begin at every w-th column."""
        if self.aligned:
            return None
        blocks = self.position_ids // block_size
        if self.document_ids is None:
            return blocks
        return torch.where(self.document_ids > 0, blocks + _DOCUMENT * (self.document_ids - 1), _PADDING)


def _check_runs(documents: Tensor) -> None:
    """Blocks are runs of columns, so padding of a row that is one document may stand at its ends alone."""
    real = documents > 0
    starts = real & (documents != functional.pad(documents[:, :-1], (1, 0)))
    if bool((starts.sum(1) > documents.amax(1)).any()):
        raise ValueError("each row's tokens must stand side by side: pad at the left or at the right, not in between")


class TransNormerAttention(nn.Module):
    """Projections, and what both kinds of attention do with relative positions.

    Args:
        config: Of the model.
        layer_idx: Which layer this is.
    """

    gain: ClassVar[float] = 1.0

    def __init__(self, config: TransNormerConfig, layer_idx: int) -> None:
        super().__init__()
        width, self.layer_idx = config.hidden_size, layer_idx
        self.num_heads = config.heads(layer_idx)
        self.head_dim = width // self.num_heads
        self.causal, self.t1 = config.causal, config.variant == "T1"
        self.q_proj, self.k_proj, self.v_proj = (Projection(width, self.gain) for _ in range(3))
        self.o_proj = Projection(width, 1.0, zero_bias=True)
        self.relative_position = RelativePosition(self.head_dim, config.relative_position == "lrpe")

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, H, T, D)``."""
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def turn(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys by their positions ``(B, T)``."""
        cos, sin, mirror = self.relative_position(position_ids, query.dtype)
        turned = (apply_rotary(heads @ mirror, cos, sin, halves_repeat=True) for heads in (query, key))
        return next(turned), next(turned)

    def merge(self, heads: Tensor) -> Tensor:
        """Heads ``(B, H, T, D)`` side by side."""
        return heads.transpose(1, 2).flatten(2)


class DiagAttention(TransNormerAttention):
    """Attention within blocks, positions beginning anew in each: softmax (T2), or ReLU and a norm (T1)."""

    def __init__(self, config: TransNormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.block_size, self.dropout = config.block_size, config.attention_dropout
        self.weights: Literal["relu", "softmax"] = "relu" if self.t1 else "softmax"
        if self.t1:
            self.norm = make_norm(config)

    def mixing_flops(self, sequence_length: int) -> int:
        """Operations of one token beside the projections: as in softmax attention, within a block."""
        return 2 * 2 * self.num_heads * self.head_dim * self.block_size // 2

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Attend.

        Args:
            hidden_states: ``(B, T, hidden)``.
            context: Of the pass.
        """
        layout = TokenLayout.of(context, len(hidden_states))
        query, key, value = self.project(hidden_states)
        query, key = self.turn(query, key, layout.position_ids % self.block_size)
        settings: dict[str, Any] = {
            "block_size": self.block_size,
            "weights": self.weights,
            "causal": self.causal,
            "dropout": self.dropout if self.training else 0.0,
        }
        layer = None if context.cache is None else context.cache_layer(self.layer_idx)
        if layer is not None and not layout.aligned:
            assert isinstance(layer, DiagCacheLayer)
            settings["past"] = layer.past()
        block_ids = context.keep("block_ids", lambda: layout.block_ids(self.block_size))
        output = block_attention(query, key, value, block_ids=block_ids, **settings)
        if layer is not None:
            assert isinstance(layer, DiagCacheLayer) and context.valid is not None
            layer.append(key, value, None if context.single else context.valid)
        merged = self.merge(output)
        projected: Tensor = self.o_proj(self.norm(merged, layout.real) if self.t1 else merged)
        return projected


class NormAttention(TransNormerAttention):
    """Linear attention without a denominator; a norm over all heads keeps its scale (equation 11)."""

    gain = 2**-0.5

    def __init__(self, config: TransNormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._slopes = config.slopes(layer_idx)
        self.norm = make_norm(config)

    def mixing_flops(self, sequence_length: int) -> int:
        """Operations of one token beside the projections: its key and value into the state, its query through it."""
        return 2 * 2 * self.num_heads * self.head_dim**2

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Attend; the arguments are those of ``DiagAttention``."""
        layout = TokenLayout.of(context, len(hidden_states))
        query, key, value = self.project(hidden_states)
        query, key = self.turn(self._features(query), self._features(key), layout.position_ids)
        if value.dtype == torch.float16:  # which ends at 65,504: sums over a few thousand tokens do not
            value = value.float()
        slopes = None
        if self._slopes is not None:
            wide = torch.promote_types(query.dtype, torch.float32)
            slopes = torch.tensor(self._slopes, dtype=wide, device=query.device)
        documents = _documents(layout, context)
        if context.cache is None:
            output, _ = linear_attention(query, key, value, causal=self.causal, slopes=slopes, **documents)
        else:
            layer = context.cache_layer(self.layer_idx)
            assert isinstance(layer, LinearStateLayer) and context.valid is not None
            known = None if context.single else context.valid
            output = attend_state(query, key, value, layer, slopes=slopes, valid=known, documents=documents)
        projected: Tensor = self.o_proj(self.norm(self.merge(output), layout.real).to(query.dtype))
        return projected

    def _features(self, heads: Tensor) -> Tensor:
        """``elu`` (T1) or ``1 + elu`` (T2)."""
        features = functional.elu(heads)
        return features if self.t1 else 1 + features


def _documents(layout: TokenLayout, context: ForwardContext) -> dict[str, Any]:
    """What linear attention must know of documents; how they lie is found once a pass."""
    ids = layout.document_ids
    if ids is None:
        return {}
    return {"document_ids": ids, "layout": context.keep("document layout", lambda: document_layout(ids))}
