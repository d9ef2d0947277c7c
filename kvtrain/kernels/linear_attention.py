"""Linear attention, causal or both ways: TransNormer's NormAttention before its norm (Qin et al. 2022).

    out_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s

has no denominator and no scale; both ways the sum is over all ``s`` and the distance is ``|t - s|``. One *scan* does
everything: it walks over chunks of tokens with the sum of ``k_s v_s`` outside of the chunk as its state, and attends
densely within the chunk, so that time and memory grow with T. Every gradient is a scan as well, of other tensors or
in the other direction: no pass keeps a score or a state of a chunk.

Why gradients are scans: with ``w(t, s)`` the weight of the pair,

    grad q_t = sum_{s <= t} w (grad_t . v_s) k_s      a scan of (grad, v, k)
    grad k_s = sum_{t >= s} w (v_s . grad_t) q_t      a scan backwards of (v, grad, q)
    grad v_s = sum_{t >= s} w (k_s . q_t) grad_t      a scan backwards of (k, q, grad)

and the states that enter are the transposed state, and the gradients of the last one. Autograd through the chunks would
keep each chunk's scores and state, ``T / c`` of ``D x D_v`` a head, and walk over them once more all the same.

Shapes: B rows, H heads, T tokens, D and D_v channels.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtrain.kernels.dispatch import autocast_off, choose_backend
from kvtrain.kernels.linear_attention_chunked import (
    Layout,
    chunk_weights,
    document_layout,
    real_tokens,
    scan_chunks,
    wide_dtype,
)
from kvtrain.kernels.linear_attention_fla import attend_fla, fla_refusal

# Tokens at a time on the CPU: with 64 channels, 32 and 64 took the same time, 128 took 1.3 times as long.
CHUNK = 64


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    layout: Layout | None = None,
    state: Tensor | None = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend without a softmax, in time and memory that grow with the number of tokens.

    Half types are multiplied and summed in float32; float64 stays float64. Gradients reach query, key, value and
    state; the gradient of a gradient is refused.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D_v)``.
        causal: Token ``t`` sees tokens ``s <= t``; otherwise all of its document.
        slopes: ``(H,)``, not negative, constants: a token weighs ``exp(-slope)`` less with every token between.
        document_ids: ``(B, T)`` integers. 0 is padding: it counts for nothing, not even as distance, gets zeros, and
            its query, key and value may be anything, NaN included. A document is a run of one other id.
        layout: What ``document_layout`` makes of ``document_ids``, where it has been made for another layer.
        state: ``(B, H, D, D_v)``, the state after the tokens before these, which the first document continues.
        chunk_size: Tokens per chunk of the torch backend.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` (on NVIDIA GPUs since Ampere, up to 128 channels, not
            for float64), which ``"auto"`` takes where it can run, or ``"fla"``, which it does not
            (``kernels.linear_attention_fla`` says what that does otherwise).

    Returns:
        Output ``(B, H, T, D_v)`` in the value's dtype, and in at least float32 the state ``(B, H, D, D_v)`` after the
        last token: the sum of its document's ``k_s v_s``, decayed up to that token. The state is the same both ways.

    Raises:
        ValueError: Shapes do not fit, slopes ask for a gradient, a state goes into both ways, or the backend cannot
            run this call.
    """
    _check(query, key, value, causal, slopes, document_ids, state, chunk_size)
    if layout is None and document_ids is not None:
        layout = document_layout(document_ids)
    if backend == "fla" and (reason := fla_refusal(query, key, value, causal)):
        raise ValueError(f"linear attention: backend 'fla' cannot run this call: {reason}")
    chosen = choose_backend("linear attention", backend, tuple(_backends(query, key, value, causal)))
    call = _Call(causal, slopes, layout, chunk_size, chosen)
    result: tuple[Tensor, Tensor]
    with autocast_off(query):
        if chosen == "fla":
            return attend_fla(query, key, value, state, layout, slopes)
        result = _LinearAttention.apply(query, key, value, state, call)  # type: ignore[no-untyped-call]
    return result


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: Tensor | None = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The definition, dense and by autograd; ``chunk_size`` and ``backend`` are there to match the other's arguments.

    ``linear_attention`` says what the arguments and the results mean.
    """
    _check(query, key, value, causal, slopes, document_ids, state, chunk_size)
    choose_backend("dense linear attention", backend, ("torch",))
    dtype, out_dtype = wide_dtype(query, key, value), value.dtype
    if document_ids is None:
        document_ids = query.new_ones(query.shape[0], query.shape[2], dtype=torch.long)
    layout = document_layout(document_ids)
    query, key, value = (real_tokens(part, layout.valid).to(dtype) for part in (query, key, value))
    pairs, left, right, carry = chunk_weights(layout.counts, layout.segments, slopes, dtype)
    if not causal:
        pairs = pairs + pairs.mT.triu(1)
    output = (query @ key.mT * pairs) @ value
    final = (right * key).mT @ value
    if state is not None:
        output = output + left * query @ state.to(dtype)
        final = final + carry * state.to(dtype)
    return output.to(out_dtype), final


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    *,
    slopes: Tensor | None = None,
    valid: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A few tokens, one after the other: what decoding does with the state.

    Args:
        query: ``(B, H, n, D)``.
        key: ``(B, H, n, D)``.
        value: ``(B, H, n, D_v)``.
        state: ``(B, H, D, D_v)``; it is left as it is, unless ``in_place``.
        slopes: ``(H,)``, as in ``linear_attention``.
        valid: ``(B, n)``; a token that is not leaves the state alone and gets zeros.
        in_place: Whether a state in the dtype that is computed in becomes the new one; no gradient then.

    Returns:
        Output ``(B, H, n, D_v)`` in the value's dtype and the new state in at least float32.
    """
    dtype, out_dtype = wide_dtype(query, key, value), value.dtype
    mask = None if valid is None else valid[:, None, :, None]
    query, key, value = (real_tokens(part, valid).to(dtype) for part in (query, key, value))
    state, outputs = state.to(dtype), []
    for token in range(query.shape[2]):
        one = slice(token, token + 1)
        if slopes is not None:
            keep = torch.exp(-slopes.to(dtype))[:, None, None]  # (H, 1, 1)
            keep = keep if mask is None else torch.where(mask[:, :, one], keep, 1.0)
            state = state.mul_(keep) if in_place else state * keep
        new = key[:, :, one].mT, value[:, :, one]
        state = state.addcmul_(*new) if in_place else torch.addcmul(state, *new)
        outputs.append(query[:, :, one] @ state)
    output = torch.cat(outputs, 2) if outputs else value
    return output.to(out_dtype), state


class _Call(NamedTuple):
    """What forward and backward share besides the differentiable tensors."""

    causal: bool
    slopes: Tensor | None
    layout: Layout | None
    chunk_size: int
    backend: str

    @property
    def valid(self) -> Tensor | None:
        """``(B, T)``, or None where every token is real."""
        return None if self.layout is None else self.layout.valid


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    slopes: Tensor | None,
    document_ids: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> None:
    batch, heads, length, dim = query.shape
    if key.shape != query.shape or value.shape[:3] != query.shape[:3]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"linear attention needs one key and one value for every query and head; found {shapes}")
    if slopes is not None and (slopes.shape != (heads,) or slopes.requires_grad):
        raise ValueError(
            f"slopes must be {heads} constants, one a head; found {tuple(slopes.shape)}; detach learned ones"
        )
    if document_ids is not None and document_ids.shape != (batch, length):
        raise ValueError(f"document_ids must be ({batch}, {length}), as the tokens; found {tuple(document_ids.shape)}")
    if state is not None and state.shape != (batch, heads, dim, value.shape[-1]):
        raise ValueError(f"state must be {(batch, heads, dim, value.shape[-1])}; found {tuple(state.shape)}")
    if state is not None and not causal:
        raise ValueError("a state is what came before; attention both ways has no before: pass state=None")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; found {chunk_size}")


def _backends(query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> list[str]:
    """Those that can run a call, best first; fla stands last until a GPU has seen it."""
    tensors, refused = (query, key, value), fla_refusal(query, key, value, causal)
    others = ["torch"] if refused else ["torch", "fla"]
    if not (_has_triton() and all(_on_gpu(tensor) and tensor.numel() for tensor in tensors)):
        return others
    from kvtrain.kernels.linear_attention_triton import DTYPES, MAX_CHANNELS

    fits = all(tensor.dtype in DTYPES and tensor.shape[-1] <= MAX_CHANNELS for tensor in tensors)
    return ["triton", *others] if fits else others


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on_gpu(tensor: Tensor) -> bool:
    """NVIDIA's, since Ampere: the kernel multiplies in tf32."""
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None,
    call: _Call,
    dtype: torch.dtype,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal attention with its output in ``dtype``, and the last state, as ``scan_chunks`` says."""
    if call.backend == "triton":
        from kvtrain.kernels.linear_attention_triton import scan_triton

        return scan_triton(query, key, value, state, call.layout, call.slopes, dtype=dtype, reverse=reverse)
    return scan_chunks(
        query, key, value, state, call.layout, call.slopes, chunk_size=call.chunk_size, dtype=dtype, reverse=reverse
    )


_scan_back = functools.partial(_scan, reverse=True)


class _LinearAttention(torch.autograd.Function):
    """Saves its arguments and nothing else; its gradients are scans of them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        """Output and last state, as ``linear_attention`` says."""
        ctx.save_for_backward(query, key, value, state)
        ctx.call = call
        if call.causal:
            return _scan(query, key, value, state, call, value.dtype)
        return _both_ways(query, key, value, None, call, value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors; the gradient of a gradient is refused."""
        query, key, value, state = ctx.saved_tensors
        call: _Call = ctx.call
        for_query, for_key, for_value, for_state, _ = ctx.needs_input_grad
        grad_query = grad_key = grad_value = grad_state = None
        forth, back = (_scan, _scan_back) if call.causal else (_both_ways, _both_ways)
        with autocast_off(grad_output):
            if for_query:
                before = None if state is None else state.mT  # sums of v k, where the scan's "keys" are v
                grad_query, _ = forth(grad_output, value, key, before, call, query.dtype)
            if for_key:
                grad_key, _ = back(value, grad_output, query, grad_final.mT, call, key.dtype)
            if for_value or for_state:
                # Behind the first token, this scan's state is the gradient of the state before it.
                grad_value, grad_state = back(key, query, grad_output, grad_final, call, value.dtype)
        if state is not None and grad_state is not None:
            grad_state = grad_state.to(state.dtype)
        return grad_query, grad_key, grad_value, grad_state if for_state else None, None


def _both_ways(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, call: _Call, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention to the tokens of a document on either side; the state enters at the end of the row.

    It is both scans, less the diagonal that both of them hold.
    """
    # Without decay one sum serves all tokens of a row, if they are one document: two products, and no chunks.
    if call.slopes is None and (call.layout is None or not bool(call.layout.segments[:, -1].any())):
        return _all_to_all(query, key, value, state, call, dtype)
    wide = wide_dtype(query, key, value)
    output, final = _scan(query, key, value, None, call, wide)
    output += _scan_back(query, key, value, state, call, wide)[0]
    query, key, value = (real_tokens(part, call.valid).to(wide) for part in (query, key, value))
    return output.addcmul_((query * key).sum(-1, keepdim=True), value, value=-1.0).to(dtype), final


def _all_to_all(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, call: _Call, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of one document without decay: every token sees one sum."""
    wide = wide_dtype(query, key, value)
    query, key, value = (real_tokens(part, call.valid).to(wide) for part in (query, key, value))
    final = key.mT @ value
    return (query @ (final if state is None else final + state.to(wide))).to(dtype), final
