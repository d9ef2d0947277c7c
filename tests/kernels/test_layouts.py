"""What an operation gives does not depend on how its tensors lie in memory, nor on how gradients come in."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_mixed import mixed_attention
from kvtrain.kernels.block_attention import block_attention
from kvtrain.kernels.compensation import add_compensation, dropped_by_window
from kvtrain.kernels.cross_entropy import linear_cross_entropy_sum, linear_token_losses
from kvtrain.kernels.distillation import TeacherHead, linear_kl_sum
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.linear_attention import linear_attention
from kvtrain.kernels.mlp import geglu, swiglu
from kvtrain.kernels.norm import rms_norm
from kvtrain.kernels.paged_attention import paged_attention
from kvtrain.kernels.pooling import pool_segments
from kvtrain.kernels.quantization import dequantize, quantize
from kvtrain.kernels.rope import apply_rotary

Shape = tuple[int, ...]
Call = Callable[..., Tensor | tuple[Tensor, ...]]
B, H, KV, T, D = 2, 4, 2, 11, 4
QUERY, KEY = (B, H, T, D), (B, KV, T, D)
IDS = torch.tensor([[1] * 4 + [2] * 7, [1] * 9 + [2] * 2])
DOCUMENTS = Documents(IDS)
TARGETS = torch.tensor([3, -100, 0, 6, 1, 2, 5])
PLACES = torch.arange(T).expand(B, -1)


def attend(**options) -> Callable[..., tuple[Tensor, ...]]:
    return lambda query, key, value: attention(query, key, value, **options)


def attend_biased(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *tensors: attention(*tensors[:3], key_bias=tensors[3], bias_after=1, backend=backend)


def attend_compensated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    local = attention(query, key, value, window=3, sink=1)
    return add_compensation(local, query, dropped_by_window(key, value, window=3, sink=1), 0.5)


def attend_pages(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """One key-value head on two pages a row, the last of them half empty; few queries and, of the same, many."""
    table, lengths = torch.tensor([[[1, 0]], [[2, 3]]], dtype=torch.int), torch.tensor([[5], [6]])
    few = paged_attention(query[:, :, :1], keys, values, table, lengths, 0.5)
    return *few, *paged_attention(query, keys, values, table, lengths, 0.5)


def through_bytes(bits: int) -> Callable[..., Tensor]:
    return lambda states: dequantize(quantize(states.detach(), bits), bits, states.shape[-1], torch.float64)


PAGES = (B, 2, T, D), (4, 4, D), (4, 4, D)
QKV = QUERY, KEY, KEY
CALLS: dict[str, tuple[Call, tuple[Shape, ...]]] = {
    **{
        f"{backend}, {name}": (attend(backend=backend, chunk_size=3, **options), QKV)
        for backend in ("flash_cpu", "chunked")
        for name, options in {
            "plain": {},
            "documents": {"documents": DOCUMENTS},
            "window": {"window": 4, "sink": 2},
            "strict": {"strict": True},
        }.items()
    },
    **{f"{backend}, biased": (attend_biased(backend), (*QKV, KEY[:3])) for backend in ("flash_cpu", "chunked")},
    "mixed": (lambda *qkvg: mixed_attention(*qkvg, window=4, sink=1), (*QKV, (KV,))),
    "mixed, documents": (
        lambda *qkvg: mixed_attention(*qkvg, window=4, position_ids=PLACES, documents=DOCUMENTS),
        (*QKV, (KV,)),
    ),
    "compensated": (attend_compensated, QKV),
    "pages": (attend_pages, PAGES),
    "blocks": (lambda *qkv: block_attention(*qkv, block_size=3), (QUERY,) * 3),
    "blocks, relu": (
        lambda *qkv: block_attention(*qkv, block_size=3, weights="relu", block_ids=PLACES // 3),
        (QUERY,) * 3,
    ),
    "linear": (lambda *qkv: linear_attention(*qkv[:3], state=qkv[3], chunk_size=4), ((QUERY,) * 3 + ((B, H, D, D),))),
    "linear, both ways": (
        lambda *qkv: linear_attention(*qkv, causal=False, document_ids=IDS, chunk_size=4),
        (QUERY,) * 3,
    ),
    "pooling": (lambda x, merge, weight: pool_segments(x, merge.sigmoid(), weight.exp(), 3), (KEY, KEY[:3], KEY[:3])),
    "norm": (lambda hidden, weight: rms_norm(hidden, weight, 1e-5), (QUERY, (D,))),
    "gate": (swiglu, (QUERY, QUERY)),
    "gate, gelu": (geglu, (QUERY, QUERY)),
    "rotary": (lambda heads, angles: apply_rotary(heads, angles.detach(), angles.detach()), (QUERY, (B, T, D))),
    "loss": (lambda hidden, head: linear_cross_entropy_sum(hidden, head, TARGETS, chunk_size=3), ((7, D), (9, D))),
    "token losses": (lambda hidden, head: linear_token_losses(hidden, head, TARGETS, chunk_size=3), ((7, D), (9, D))),
    "divergence": (
        lambda hidden, head, *teacher: linear_kl_sum(hidden, head, TeacherHead(*teacher), TARGETS >= 0, chunk_size=3),
        ((7, D), (9, D), (7, 3), (9, 3)),
    ),
    "8 bits": (through_bytes(8), (QUERY,)),
    "4 bits": (through_bytes(4), (QUERY,)),
}


def relaid(tensor: Tensor, chance: random.Random) -> Tensor:
    """The same numbers, axes in any order in memory, NaN between one and the next, or not."""
    order = list(range(tensor.dim()))
    chance.shuffle(order)
    room = tensor.permute(order)
    room = torch.stack([room, torch.full_like(room, math.nan)], -1)[..., 0] if chance.random() < 0.5 else room.clone()
    return room.permute([order.index(axis) for axis in range(tensor.dim())])


def repeated(tensor: Tensor, chance: random.Random) -> Tensor:
    """The first entry along some axis everywhere, with stride 0."""
    return tensor.narrow(chance.randrange(tensor.dim()), 0, 1).expand_as(tensor) if tensor.dim() else tensor


def results_of(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    found = call(*tensors)
    return list(found) if isinstance(found, tuple) else [found]


def outcome(call: Call, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results without gradients and with them, and those of the tensors for ``grads`` that come in."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    learnt = [result for result in results_of(call, leaves) if result.requires_grad]
    learned = torch.autograd.grad(learnt, leaves, grads[: len(learnt)], allow_unused=True) if learnt else ()
    return [*results_of(call, tensors), *learnt, *(grad for grad in learned if grad is not None)]


@pytest.mark.parametrize("name", CALLS)
@settings(derandomize=True, deadline=None, max_examples=12, database=None)
@given(seed=st.integers(0, 10**6))
def test_any_layout(name: str, seed: int):
    call, shapes = CALLS[name]
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def laid(shape: Shape) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        return chance.choice([relaid, relaid, repeated])(tensor, chance)

    tensors = [laid(shape) for shape in shapes]
    grads = [laid(result.shape) for result in results_of(call, tensors)]
    plain = ([tensor.clone(memory_format=torch.contiguous_format) for tensor in group] for group in (tensors, grads))
    for actual, expected in zip(outcome(call, tensors, grads), outcome(call, *plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
