"""The Triton backend of ``kernels.linear_attention``: one kernel, which is forward pass and gradients alike.

A program owns one head of one row and some channels of the values. It walks over chunks of tokens with its part of
the state in registers. Sums and the state are float32. Of half types, factors are tf32, whose mantissa is no shorter
than theirs; of float32, every product is three of tf32, which is near float32.

The walk is sequential, so programs are what fills the device: one a row, head and ``_VALUE_CHANNELS`` channels of the
values, which share nothing but the scores that each of them computes. Splitting the row as well would take a second
kernel for the states between the parts, and memory for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtrain.kernels.linear_attention_chunked import Layout

# Compiled for compute capability 9.0 and 128 channels, this takes 64 KiB of shared memory in float32, 20 in half types.
_CHUNK, _VALUE_CHANNELS = 32, 32
MAX_CHANNELS = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scan_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None,
    layout: Layout | None,
    slopes: Tensor | None,
    *,
    dtype: torch.dtype,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What ``scan_chunks`` does, on CUDA; arguments and results are as there, but nothing is float64.

    Args:
        query: ``(B, H, T, D)`` of any strides, ``D`` at most ``MAX_CHANNELS``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D_v)``, ``D_v`` likewise.
        state: ``(B, H, D, D_v)`` or None.
        layout: Documents and padding, or None.
        slopes: ``(H,)`` or None.
        dtype: Of the output.
        reverse: Start at the end of the rows.
    """
    (batch, heads, length, dim), value_dim = query.shape, value.shape[-1]
    output = query.new_empty((batch, heads, length, value_dim), dtype=dtype)
    final = query.new_empty((batch, heads, dim, value_dim), dtype=torch.float32)
    block_value = min(_VALUE_CHANNELS, _block(value_dim))
    with torch.cuda.device_of(query):
        _scan_kernel[(batch * heads, triton.cdiv(value_dim, block_value))](
            query,
            key,
            value,
            output,
            final if state is None else state.float().contiguous(),  # something must stand where nothing is read
            final,
            final if slopes is None else slopes.float().contiguous(),
            *((final,) * 3 if layout is None else _by_rows(layout)),
            query.stride(),
            key.stride(),
            value.stride(),
            heads,
            length,
            dim,
            value_dim,
            block=_CHUNK,
            block_dim=_block(dim),
            block_value=block_value,
            has_state=state is not None,
            has_slopes=slopes is not None,
            has_layout=layout is not None,
            reverse=reverse,
            precision="tf32x3" if torch.float32 in (query.dtype, key.dtype, value.dtype) else "tf32",
            num_stages=1,
            num_warps=8 if dim > 64 else 4,
        )
    return output, final


def _by_rows(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel reads of a layout, each row's tokens side by side: document ids may lie anyhow."""
    valid = layout.valid.view(torch.uint8)
    return layout.counts.contiguous(), layout.segments.contiguous(), valid.contiguous()


def _block(channels: int) -> int:
    """A power of two that holds them; ``tl.dot`` takes no less than 16."""
    return max(16, int(triton.next_power_of_2(channels)))


@triton.jit  # type: ignore[untyped-decorator]
def _load_tokens(
    states: tl.tensor,
    strides: tl.tuple,
    row: tl.tensor,
    head: tl.tensor,
    at: tl.tensor,
    real: tl.tensor,
    channels: tl.tensor,
    dim: tl.tensor,
) -> tl.tensor:
    """``(tokens, channels)`` in float32; what is not real is not read, and may hold anything."""
    places = row * strides[0] + head * strides[1] + at[:, None] * strides[2] + channels[None, :] * strides[3]
    return tl.load(states + places, mask=real[:, None] & (channels < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _load_layout(
    column: tl.tensor, row: tl.tensor, length: tl.tensor, start: tl.tensor, stop: tl.tensor, at: tl.tensor
) -> tl.tensor:
    """What a ``(B, T + 1)`` tensor of a layout holds for tokens, before the chunk, and for its last token."""
    column += row * (length + 1)
    return tl.load(column + 1 + at, mask=at < length, other=0), tl.load(column + start), tl.load(column + stop)


@triton.jit  # type: ignore[untyped-decorator]
def _decay(steps: tl.tensor, slope: tl.tensor, same: tl.tensor) -> tl.tensor:
    """Weights after some steps within a document, 0 between documents."""
    return tl.where(same, tl.exp(-slope * tl.maximum(steps, 0).to(tl.float32)), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _advance(
    running: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    weights: tl.tensor,
    read: tl.tensor,
    write: tl.tensor,
    kept: tl.tensor,
    precision: tl.constexpr,
) -> tl.tensor:
    """What a chunk's tokens get, from each other and from the state before them, and the state behind them."""
    scores = tl.dot(query, tl.trans(key), input_precision=precision) * weights
    result = tl.dot(scores, value, input_precision=precision)
    result += tl.dot(query * read[:, None], running, input_precision=precision)
    running *= kept
    running += tl.dot(tl.trans(key * write[:, None]), value, input_precision=precision)
    return result, running


@triton.jit  # type: ignore[untyped-decorator]
def _scan_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    output: tl.tensor,
    state: tl.tensor,
    final: tl.tensor,
    slopes: tl.tensor,
    counts: tl.tensor,
    segments: tl.tensor,
    valid: tl.tensor,
    query_strides: tl.tuple,
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    heads: tl.tensor,
    length: tl.tensor,
    dim: tl.tensor,
    value_dim: tl.tensor,
    block: tl.constexpr,
    block_dim: tl.constexpr,
    block_value: tl.constexpr,
    has_state: tl.constexpr,
    has_slopes: tl.constexpr,
    has_layout: tl.constexpr,
    reverse: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    dims, values = tl.arange(0, block_dim), tl.program_id(1) * block_value + tl.arange(0, block_value)
    is_dim, is_value = (dims < dim)[:, None], (values < value_dim)[None, :]
    corner = ((row * heads + head) * dim + dims[:, None]) * value_dim + values[None, :]
    running = tl.zeros((block_dim, block_value), tl.float32)
    if has_state:
        running = tl.load(state + corner, mask=is_dim & is_value, other=0.0)
    slope = tl.load(slopes + head) if has_slopes else 0.0
    for step in range(tl.cdiv(length, block)):
        start = (tl.cdiv(length, block) - 1 - step if reverse else step) * block
        stop = tl.minimum(start + block, length)
        at = (start + tl.arange(0, block)).to(tl.int64)
        # Without a layout every token is real, and a token's count of real tokens is its position.
        real, count, first, last, segment, segment_first, segment_last = at < length, at + 1, start, stop, at * 0, 0, 0
        if has_layout:
            real = tl.load(valid + row * length + at, mask=at < length, other=0) != 0
            count, first, last = _load_layout(counts, row, length, start, stop, at)
            segment, segment_first, segment_last = _load_layout(segments, row, length, start, stop, at)
        q = _load_tokens(query, query_strides, row, head, at, real, dims, dim)
        k = _load_tokens(key, key_strides, row, head, at, real, dims, dim)
        v = _load_tokens(value, value_strides, row, head, at, real, values, value_dim)
        steps, seen = count[:, None] - count[None, :], at[:, None] >= at[None, :]
        read = _decay(count - first, slope, segment == segment_first)  # of the state, by each token
        write = _decay(last - count, slope, segment == segment_last)  # into the state
        if reverse:
            steps, seen, read, write = -steps, at[:, None] <= at[None, :], write, read
        weights = _decay(steps, slope, seen & (segment[:, None] == segment[None, :]))
        kept = _decay(last - first, slope, segment_first == segment_last)
        result, running = _advance(running, q, k, v, weights, read, write, kept, precision)
        places = ((row * heads + head) * length + at[:, None]) * value_dim + values[None, :]
        tl.store(output + places, result.to(output.dtype.element_ty), mask=(at < length)[:, None] & is_value)
    tl.store(final + corner, running, mask=is_dim & is_value)
