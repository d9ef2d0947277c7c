"""The torch backend of ``kernels.linear_attention``: chunks one after the other, dense within.

Larger chunks compute more pairs that causality hides, smaller ones are more and smaller products; all chunks at once,
with a cumulative sum of their states, would hold ``T / c`` states of ``D x D_v`` a head. Decay is
``exp(-slope (t - s))`` of a distance that is never negative, one matrix a chunk. As a factor of the query,
``exp(-slope t)``, and one of the key, ``exp(slope s)``, it would need no matrix, but the second can overflow.

Shapes are those of ``kernels.linear_attention``; c counts the tokens of one chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtrain.kernels.cpu_tiling import spans


class Layout(NamedTuple):
    """Where documents and padding lie.

    Attributes:
        segments: ``(B, T + 1)``, how many documents began before each token's own; the first column stands for what
            is before the row, and belongs to the first document.
        counts: ``(B, T + 1)``, real tokens up to each one, itself included; the first column is 0.
        valid: ``(B, T)``, whether a token is real.
    """

    segments: Tensor
    counts: Tensor
    valid: Tensor


class Weights(NamedTuple):
    """How much of what reaches what in a chunk; all broadcast to ``(B, H, ...)``.

    Attributes:
        pairs: ``(c, c)`` from each token to each later one, 0 for the others.
        left: ``(c, 1)`` from the token before the chunk to each one.
        right: ``(c, 1)`` from each one to the chunk's last token.
        carry: ``(1, 1)`` from the token before the chunk to its last one.
    """

    pairs: Tensor
    left: Tensor
    right: Tensor
    carry: Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def document_layout(document_ids: Tensor) -> Layout:
    """Number the documents of ``(B, T)`` ids and their real tokens; padding belongs to the document before it."""
    valid = document_ids != 0
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    latest = pad(torch.where(valid, index, -1), (1, 0), value=-1).cummax(1).values[:, :-1]  # real token before each
    before = document_ids.gather(1, latest.clamp(min=0))
    begins = valid & (latest >= 0) & (document_ids != before)
    return Layout(pad(begins.cumsum(1), (1, 0)), pad(valid.cumsum(1), (1, 0)), valid)


def scan_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None,
    layout: Layout | None,
    slopes: Tensor | None,
    *,
    chunk_size: int,
    dtype: torch.dtype,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Linear attention of tokens to earlier ones, or in reverse to later ones.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D_v)``.
        state: ``(B, H, D, D_v)`` that stands before the row, in reverse behind it; None for zeros.
        layout: Documents and padding; None: every row is one document without padding.
        slopes: ``(H,)``; None for no decay.
        chunk_size: Tokens per chunk.
        dtype: Of the output.
        reverse: Start at the end of the rows.

    Returns:
        Output ``(B, H, T, D_v)``, and in at least float32 the state ``(B, H, D, D_v)`` that leaves at the other end.
    """
    (batch, heads, length, dim), value_dim = query.shape, value.shape[-1]
    chunks = _Chunks(layout, slopes, (batch, heads), wide_dtype(query, key, value), query.device)
    running = query.new_zeros((batch, heads, dim, value_dim), dtype=chunks.dtype)
    if state is not None:
        running.copy_(state)
    output = query.new_empty((batch, heads, length, value_dim), dtype=dtype)
    cuts = [(cut.start, min(cut.stop, length)) for cut in spans(length, chunk_size)]
    alike = [True] * len(cuts) if layout is None else _alike(layout, cuts)
    for (start, stop), plain in list(zip(cuts, alike, strict=True))[:: -1 if reverse else 1]:
        span = slice(start, stop)
        part = chunks.attend(
            query[:, :, span],
            key[:, :, span],
            value[:, :, span],
            running.flatten(0, 1),
            None if plain else span,
            reverse,
        )
        output[:, :, start:stop] = part.view(batch, heads, stop - start, value_dim)
    return output, running


def _alike(layout: Layout, cuts: list[tuple[int, int]]) -> list[bool]:
    """Whether a chunk goes on, in every row, with the document before it, and holds nothing else and no padding.

    Most do. Their weights depend on the length alone and are made once, where those of the others cost ``(B, H, c, c)``
    exponentials a chunk. The whole row is asked in one go: each question waits for the device.
    """
    starts, stops = torch.tensor(cuts, device=layout.counts.device, dtype=torch.long).view(-1, 2).unbind(1)
    tokens = layout.counts[:, stops] - layout.counts[:, starts]
    alike = (tokens == stops - starts) & (layout.segments[:, stops] == layout.segments[:, starts])
    found: list[bool] = alike.all(0).tolist()
    return found


class _Chunks:
    """The arithmetic of one chunk; B and H are one dimension, for batched products."""

    def __init__(
        self,
        layout: Layout | None,
        slopes: Tensor | None,
        rows: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout, self.slopes = layout, slopes
        self.rows, self.dtype, self.device = rows, dtype, device
        self.plain: dict[int, Weights] = {}  # by length: documents and padding have no part in them

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, state: Tensor, span: slice | None, reverse: bool
    ) -> Tensor:
        """Output ``(B H, c, D_v)`` of a chunk; the state ``(B H, D, D_v)`` is moved past it in place.

        Where in the rows the chunk lies matters only to documents and padding; without them, ``span`` is None.
        """
        query, key, value = (self.take(part, span) for part in (query, key, value))
        scores, carry = torch.bmm(query, key.mT), None
        if self.slopes is None and span is None:
            scores = scores.triu_() if reverse else scores.tril_()
        else:
            pairs, left, right, carry = self.weights(query.shape[1], span)
            if reverse:  # the distance to what lies before the chunk is now that to what lies behind it
                pairs, left, right = pairs.mT, right, left
            scores, query, key = self.weigh(scores, pairs), self.weigh(query, left), self.weigh(key, right)
        # In place, into the scores' product and the running state: nothing else of their sizes is allocated a chunk.
        output = torch.bmm(scores, value).baddbmm_(query, state)
        if carry is not None:
            state.unflatten(0, self.rows).mul_(carry)
        state.baddbmm_(key.mT, value)
        return output

    def take(self, part: Tensor, span: slice | None) -> Tensor:
        """``(B, H, c, D)`` as ``(B H, c, D)`` in the scan's dtype, padding zeroed."""
        if self.layout is not None and span is not None:
            part = real_tokens(part, self.layout.valid[:, span])
        return part.flatten(0, 1).to(self.dtype)

    def weigh(self, flat: Tensor, weights: Tensor) -> Tensor:
        """``(B H, m, n)`` times weights that broadcast to ``(B, H, m, n)``."""
        weighed: Tensor = flat.unflatten(0, self.rows) * weights
        return weighed.flatten(0, 1)

    def weights(self, length: int, span: slice | None) -> Weights:
        """Weights of the tokens of a span, or of any that is plain."""
        if self.layout is not None and span is not None:
            columns = slice(span.start, span.stop + 1)
            return chunk_weights(
                self.layout.counts[:, columns], self.layout.segments[:, columns], self.slopes, self.dtype
            )
        if length not in self.plain:
            counts = torch.arange(length + 1, device=self.device)[None]
            self.plain[length] = chunk_weights(counts, None, self.slopes, self.dtype)
        return self.plain[length]


def chunk_weights(counts: Tensor, segments: Tensor | None, slopes: Tensor | None, dtype: torch.dtype) -> Weights:
    """Weights of c tokens, from the ``(B or 1, c + 1)`` columns of a layout that begin before the first of them."""

    def weigh(later: slice, earlier: slice) -> Tensor:
        steps = counts[:, None, later, None] - counts[:, None, None, earlier]
        decay = torch.zeros_like(steps, dtype=dtype) if slopes is None else -slopes.to(dtype)[:, None, None] * steps
        weights = decay.exp_()
        if segments is not None:
            weights = weights * (segments[:, None, later, None] == segments[:, None, None, earlier])
        return weights

    before, inside, last = slice(1), slice(1, None), slice(-1, None)
    pairs, left = weigh(inside, inside).tril(), weigh(inside, before)
    return Weights(pairs, left, weigh(last, inside).mT, weigh(last, before))


def real_tokens(states: Tensor, valid: Tensor | None) -> Tensor:
    """``(B, H, T, D)`` with zeros for padding, whatever it holds; ``valid`` is ``(B, T)``."""
    return states if valid is None else torch.where(valid[:, None, :, None], states, 0)
