"""The fla backend of ``kernels.linear_attention``: ``simple_gla`` of flash-linear-attention, for whoever asks for it.

``backend="fla"`` chooses it, or ``KVTRAIN_AVOID=triton,torch`` for whole models; ``"auto"`` does not, because the
library has run here on Triton's interpreter and on no GPU yet. What it computes,

    state_t = exp(g) state_{t-1} + k_t v_t,    out_t = scale q_t state_t,

is ours with ``scale = 1`` and ``g = -slope``. Rows of several documents, or with padding, are laid end to end without
their padding, a sequence a document, of which the first of each row begins with the row's state: padding then is no
distance either.

Unlike ours it cannot look both ways, has no float64, in half types keeps the states between its chunks in these, and
multiplies float32 in tf32 on GPUs that have it. Gradients are the library's own; it keeps its arguments and no more.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from kvtrain.kernels.linear_attention_chunked import Layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Lengths = tuple[Tensor, Tensor]  # edges of sequences (N + 1,) and the row of each (N,)


def fla_refusal(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> str | None:
    """Why the library cannot run a call, with the remedy; None where it can.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D_v)``.
        causal: Whether tokens see earlier ones alone.
    """
    tensors = (query, key, value)
    if not (all(tensor.is_cuda for tensor in tensors) or os.environ.get("TRITON_INTERPRET") == "1"):
        return "its tensors must lie on a CUDA device; move them there, or let TRITON_INTERPRET=1 run it on the CPU"
    if not _is_installed():
        return "flash-linear-attention is not installed; pip install 'kvtrain[fla]'"
    if not causal:
        return "it does not look ahead; pass causal=True, or backend='auto'"
    dtype = _common_dtype(*tensors)
    if dtype not in _DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}; pass float32 or a half type, or backend='auto'"
    if dtype != torch.float32 and (query.shape[-1] % 2 or value.shape[-1] % 2):
        return "half types need an even number of channels there; pad them, or pass float32 or backend='auto'"
    if not (query.numel() and value.numel()):
        return "it needs a token, a head and a channel; pass backend='auto'"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def _common_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    """The library multiplies factors of one dtype."""
    return torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)


def attend_fla(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, layout: Layout | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal linear attention, as ``kernels.linear_attention`` says.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D_v)``.
        state: ``(B, H, D, D_v)``, what stands before the rows; None for zeros.
        layout: Documents and padding; None: every row is one document without padding.
        slopes: ``(H,)``; None for no decay.

    Returns:
        Output ``(B, H, T, D_v)`` in the value's dtype and the last state ``(B, H, D, D_v)`` in float32.
    """
    dtype = _common_dtype(query, key, value)
    parts = [part.to(dtype).transpose(1, 2) for part in (query, key, value)]  # (B, T, H, channels)
    if layout is None:
        output, final = _simple_gla(parts, slopes, state)
    else:
        output, final = _by_documents(parts, slopes, state, layout)
    return output.transpose(1, 2).to(value.dtype), final


def _simple_gla(
    parts: list[Tensor], slopes: Tensor | None, state: Tensor | None, edges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and last states of query, key and value ``(B, T, H, channels)``, or ``(1, N, H, channels)`` with edges."""
    from fla.ops.simple_gla import chunk_simple_gla

    output, final = chunk_simple_gla(
        *parts,
        g_gamma=None if slopes is None else -slopes.float(),
        scale=1.0,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        cu_seqlens=edges,
    )
    return output, final.float()


def _by_documents(
    parts: list[Tensor], slopes: Tensor | None, state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """``_simple_gla`` of real tokens alone, document by document."""
    query, _, value = parts
    (batch, _, heads, dim), value_dim = query.shape, value.shape[-1]
    if state is None:
        state = query.new_zeros((batch, heads, dim, value_dim), dtype=torch.float32)
    final, output = state.float(), value.new_zeros(value.shape)
    real = layout.valid.nonzero(as_tuple=True)  # the row of each token, and its column
    if not len(real[0]):
        return output, final
    edges, rows = _sequences(layout, *real)
    changes = rows[1:] != rows[:-1]
    first, last = (torch.nn.functional.pad(changes, side, value=True) for side in ((1, 0), (0, 1)))
    entering = torch.where(first[:, None, None, None], final[rows], 0.0)
    attended, leaving = _simple_gla([part[real][None] for part in parts], slopes, entering, edges)
    return output.index_put(real, attended[0]), final.index_put((rows[last],), leaving[last])


def _sequences(layout: Layout, rows: Tensor, columns: Tensor) -> _Lengths:
    """Where documents begin among real tokens, which stand at ``rows (N,)`` and ``columns (N,)``, and their rows."""
    documents = layout.segments[rows, columns + 1]
    begins = (rows[1:] != rows[:-1]) | (documents[1:] != documents[:-1])
    starts = torch.nn.functional.pad(begins, (1, 0), value=True).nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=len(rows)), rows[starts]
