"""A call of every kernel that runs on more devices than one, beside its definition."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtrain.kernels.attention import attention, merge_attention
from kvtrain.kernels.attention_mixed import mixed_attention, window_attention
from kvtrain.kernels.block_attention import Past, block_attention
from kvtrain.kernels.compensation import dropped_by_window
from kvtrain.kernels.cross_entropy import linear_cross_entropy_sum
from kvtrain.kernels.dispatch import wide_matmul
from kvtrain.kernels.distillation import TeacherHead, linear_kl_sum, linear_mixed_sum
from kvtrain.kernels.documents import Documents
from kvtrain.kernels.experts import experts_mlp
from kvtrain.kernels.linear_attention import linear_attention, linear_attention_reference, linear_attention_step
from kvtrain.kernels.mlp import geglu, swiglu
from kvtrain.kernels.norm import rms_norm, simple_rms_norm
from kvtrain.kernels.pooling import pool_segments, pool_segments_reference
from kvtrain.kernels.rope import apply_rotary, rotary_angles
from kvtrain.models.context import document_positions
from tests.kernels import test_attention_mixed as mixed
from tests.kernels import test_block_attention as blocks
from tests.kernels import test_cross_entropy as cross_entropy
from tests.kernels import test_distillation as distillation
from tests.kernels import test_experts as experts
from tests.kernels import test_linear_attention as linear
from tests.kernels import test_pointwise as pointwise
from tests.models import test_duo_compensation as compensation

INF = float("inf")
FREQUENCIES = 100.0 ** -(torch.arange(8, dtype=torch.float64) / 8)


@dataclass
class KernelCall:
    """One call.

    Attributes:
        kernel: What runs on the device.
        definition: What it must give, in float64.
        tensors: Arguments that are differentiated, float64.
        options: The others, of both; tensors among them keep their dtype.
    """

    kernel: Callable[..., Any]
    definition: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def found(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Results and gradients of the kernel."""
        return _outcome(self.kernel, self.tensors, self.options, device, dtype)

    def exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of the definition, for tensors that ``dtype`` can hold."""
        held = {name: tensor.to(dtype).double() for name, tensor in self.tensors.items()}
        return _outcome(self.definition, held, self.options, "cpu", torch.float64)


def _outcome(
    function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results, and gradients of a random linear loss of what is finite in them."""
    leaves = {name: tensor.to(device, dtype).detach().requires_grad_() for name, tensor in tensors.items()}
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for place, result in enumerate(results):
        factors = normal(*result.shape, seed=90 + place).to(device)
        loss = loss + (result.double().masked_fill(result == -INF, 0.0) * factors).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"result {place}": result.detach() for place, result in enumerate(results)}
    found |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.cpu() for name, tensor in found.items()}


def normal(*shape: int, seed: int) -> Tensor:
    """Float64, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(length: int = 150, *, groups: int = 2, dim: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Query, key and value of two rows; 150 tokens are more than a block of any backend."""
    shapes = {"query": 2 * groups, "key": 2, "value": 2}
    return {name: normal(2, heads, length, dim, seed=seed + i) for i, (name, heads) in enumerate(shapes.items())}


def documents(length: int = 150) -> Tensor:
    """Ids of several documents a row, ``(2, T)``."""
    return torch.stack([torch.arange(length) // 47, torch.arange(length) // 100])


def _rotary(heads: Tensor, positions: Tensor, **options: Any) -> Tensor:
    angles = rotary_angles(FREQUENCIES.to(heads.device), positions, heads.dtype)
    return apply_rotary(heads, *angles, **options)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By angles that are learnt, which are not the repetition of their halves."""
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _simple_norm(hidden: Tensor, epsilon_in_root: bool) -> Tensor:
    square = hidden.square().mean(-1, keepdim=True)
    return hidden / ((square + 0.1).sqrt() if epsilon_in_root else square.sqrt() + 0.1)


def _pool(pool: Callable[..., Tensor], inputs: Tensor, merge: Tensor, weights: Tensor) -> Tensor:
    return pool(inputs, merge.sigmoid(), weights.exp(), 12)


def _mixed(kernel: Callable[..., Any], documents: Tensor | None = None, **arguments: Any) -> Any:
    positions = None if documents is None else document_positions(documents)
    return kernel(**arguments, window=20, sink=3, position_ids=positions, documents=Documents.of(documents))


def _window(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shared: dict[str, Any] = {"documents": Documents.of(documents), "backend": "reference"}
    sinks = {"sink": 3} if documents is None else {"sinks": document_positions(documents) < 3}
    return attention(query, key, value, window=20, **sinks, **shared)


def _dropped(key: Tensor, value: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    positions = document_positions(documents)
    sums = dropped_by_window(key, value, window=7, sink=2, position_ids=positions, documents=Documents(documents))
    return sums.keys, sums.values


def _dense_dropped(key: Tensor, value: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    index, places = torch.arange(key.shape[2]), document_positions(documents)
    gone = (index[:, None] - index >= 7) & (places[:, None] >= 2) & (documents[:, :, None] == documents[:, None])
    return gone[:, None].double() @ key, gone[:, None].double() @ value


def _halves_merged(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    halves = zip(key.chunk(2, 2), value.chunk(2, 2), strict=True)
    return merge_attention([attention(query, *half, causal=False, backend="chunked") for half in halves])


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, causal: bool, weights: Any) -> Tensor:
    return block_attention(query, key, value, block_size=16, weights=weights, causal=causal, block_ids=ids)


def _dense_blocks(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, causal: bool, weights: str) -> Tensor:
    return blocks.dense(query, key, value, blocks.seen_by(ids, causal=causal), weights)


def _with_past(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    past = Past(keys, values, ids[:, : keys.shape[2]])
    return block_attention(query, key, value, block_size=16, block_ids=ids[:, keys.shape[2] :], past=past)


def _dense_past(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    seen = blocks.seen_by(ids[:, keys.shape[2] :], ids[:, : keys.shape[2]])
    return blocks.dense(query, torch.cat([keys, key], 2), torch.cat([values, value], 2), seen, "softmax")


def _recurrence(valid: Tensor, **arguments: Tensor) -> tuple[Tensor, Tensor]:
    return linear_attention_reference(**arguments, document_ids=valid.long())


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_sum(hidden, weight, targets, chunk_size=32, backend="torch")


def _divergence(kernel: Callable[..., Any], targets: Tensor, hidden: Tensor, weight: Tensor, **arguments: Any) -> Any:
    teacher = TeacherHead(arguments.pop("teacher_hidden"), arguments.pop("teacher_weight"))
    return kernel(hidden, weight, teacher, targets >= 0, **arguments)


def _mixture(targets: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    teacher = TeacherHead(teacher_hidden, teacher_weight)
    return linear_mixed_sum(hidden, weight, teacher, targets, divergence_weight=0.7).total


def _dense_mixture(targets: Tensor, hidden: Tensor, weight: Tensor, **teacher: Tensor) -> Tensor:
    settings = {"direction": "forward", "temperature": 1.0}
    factors = {"hidden": hidden, "weight": weight, **teacher, **settings}
    divergence = _divergence(distillation.dense_kl, targets, **factors)
    return 0.7 * divergence + 0.3 * cross_entropy.plain(hidden, weight, targets)


def pointwise_calls() -> dict[str, KernelCall]:
    """Norms, gate, experts, rotary embedding, and products that are not rounded."""
    few, chosen = experts.problem()
    hidden, weight = normal(3, 37, 48, seed=0), normal(48, seed=1)
    turned, positions = normal(2, 3, 20, 16, seed=2), torch.stack([torch.arange(20), torch.arange(20) + 900])
    angles = {"cos": normal(2, 20, 16, seed=3), "sin": normal(2, 20, 16, seed=4)}
    formula = partial(pointwise.rotary_formula, frequencies=FREQUENCIES)
    calls = {
        "norm": KernelCall(
            partial(rms_norm, epsilon=1e-5, backend="torch"),
            partial(pointwise.norm_formula, epsilon=1e-5),
            {"hidden": hidden, "weight": weight},
        ),
        "gate": KernelCall(
            partial(swiglu, backend="torch"), pointwise.swiglu_formula, {"gate": hidden, "up": hidden.flip(0)}
        ),
        "gate, gelu": KernelCall(geglu, pointwise.geglu_formula, {"gate": hidden, "up": hidden.flip(0)}),
        "rotary": KernelCall(partial(_rotary, backend="torch"), formula, {"heads": turned}, {"positions": positions}),
        "rotary, learnt angles": KernelCall(apply_rotary, _turned, {"heads": turned, **angles}),
        "experts": KernelCall(experts_mlp, experts.definition, few, {"chosen": chosen}),
        "wide product": KernelCall(
            lambda left, right: wide_matmul(left, right.mT),
            lambda left, right: left @ right.mT,
            {"left": turned, "right": turned.flip(2)},
        ),
    }
    for in_root in (False, True):
        calls[f"norm without weights, epsilon in root: {in_root}"] = KernelCall(
            partial(simple_rms_norm, epsilon=0.1, epsilon_in_root=in_root),
            partial(_simple_norm, epsilon_in_root=in_root),
            {"hidden": hidden},
        )
    return calls


def softmax_calls() -> dict[str, KernelCall]:
    """Pooling, and what is built on attention; ``test_attention.py`` has its backends."""
    tensors, packed = heads(), {"documents": documents()}
    gates = {"gates": torch.tensor([0.3, 0.8], dtype=torch.float64)}
    pooled = {
        "inputs": normal(2, 2, 70, 6, seed=5),
        "merge": normal(2, 2, 70, seed=6),
        "weights": normal(2, 2, 70, seed=7),
    }
    calls = {
        "what a window has dropped": KernelCall(
            _dropped, _dense_dropped, {name: tensors[name] for name in ("key", "value")}, packed
        ),
        "pooling": KernelCall(partial(_pool, pool_segments), partial(_pool, pool_segments_reference), pooled),
        "merged halves": KernelCall(
            _halves_merged, partial(attention, causal=False, backend="reference"), heads(seed=20)
        ),
    }
    for name, options in (("one document", {}), ("documents", packed)):
        mix = partial(mixed.definition, window=20, sink=3, documents=options.get("documents"))
        calls |= {
            f"mixed attention, {name}": KernelCall(
                partial(_mixed, mixed_attention),
                lambda documents=None, mix=mix, **parts: mix(**parts),
                tensors | gates,
                options,
            ),
            f"window attention, {name}": KernelCall(partial(_mixed, window_attention), _window, tensors, options),
            f"compensation, {name}": KernelCall(
                lambda **parts: compensation.compensated(**parts, window=7, sink=2)[0],
                partial(compensation.definition, window=7, sink=2),
                heads(33, dim=4),
                {"documents": documents(33) + 1} if options else {},
            ),
        }
    return calls


def block_calls() -> dict[str, KernelCall]:
    """Attention within blocks that begin at every 16th token, anywhere, and before the input."""
    tensors, ids = heads(70, groups=1), torch.stack([torch.arange(70) // 16, (torch.arange(70) + 5) // 16])
    past = {f"{name}s": normal(2, 2, 16, 16, seed=30 + i) for i, name in enumerate(("key", "value"))}
    places = torch.stack([torch.arange(86), torch.arange(86) + 5]) // 16
    calls = {"blocks, earlier tokens": KernelCall(_with_past, _dense_past, tensors | past, {"ids": places})}
    for weights in ("softmax", "relu"):
        for causal in (True, False):
            kind: dict[str, Any] = {"causal": causal, "weights": weights}
            calls[f"blocks anywhere, {weights}, causal: {causal}"] = KernelCall(
                _in_blocks, _dense_blocks, tensors, {"ids": ids, **kind}
            )
            calls[f"blocks at every 16th token, {weights}, causal: {causal}"] = KernelCall(
                partial(block_attention, block_size=16, **kind),
                partial(_dense_blocks, ids=ids[:1].expand(2, -1), **kind),
                tensors,
            )
    return calls


def linear_calls() -> dict[str, KernelCall]:
    """Linear attention by chunks and by steps; ``test_linear_attention.py`` has its kernel."""
    tensors = linear.tensors_of(7, length=150, dim=16, value_dim=24, state=True)
    without_state = {name: tensor for name, tensor in tensors.items() if name != "state"}
    packed = {"document_ids": documents() + 1, "slopes": linear.SLOPES}
    few = linear.tensors_of(8, length=4, dim=16, value_dim=24, state=True)
    valid = torch.tensor([[True] * 4, [False, True, True, False]])
    by_chunks = partial(linear_attention, backend="torch")
    return {
        "linear attention": KernelCall(by_chunks, linear_attention_reference, tensors),
        "linear attention, documents, decay": KernelCall(by_chunks, linear_attention_reference, tensors, packed),
        "linear attention, both ways": KernelCall(
            by_chunks, linear_attention_reference, without_state, {"causal": False, **packed}
        ),
        "linear attention, steps": KernelCall(
            linear_attention_step, _recurrence, few, {"valid": valid, "slopes": linear.SLOPES}
        ),
    }


def loss_calls() -> dict[str, KernelCall]:
    """Losses of a linear head of 301 tokens."""
    factors = {"hidden": normal(70, 24, seed=40) / 4, "weight": normal(301, 24, seed=41)}
    teacher = {"teacher_hidden": normal(70, 20, seed=42) / 4, "teacher_weight": normal(301, 20, seed=43)}
    targets = torch.randint(301, (70,), generator=torch.Generator().manual_seed(44))
    targets[::5] = -100
    learnt = {"targets": targets, **teacher}
    calls = {
        "cross-entropy": KernelCall(
            _cross_entropy,
            cross_entropy.plain,
            factors,
            {"targets": targets},
        ),
        "divergence and cross-entropy": KernelCall(_mixture, _dense_mixture, factors, learnt),
    }
    for direction, temperature in (("forward", 1.0), ("reverse", 2.5)):
        calls[f"{direction} divergence"] = KernelCall(
            partial(_divergence, partial(linear_kl_sum, chunk_size=32)),
            partial(_divergence, distillation.dense_kl),
            factors,
            {**learnt, "direction": direction, "temperature": temperature},
        )
    return calls


def kernel_calls() -> dict[str, KernelCall]:
    """All of them."""
    return pointwise_calls() | softmax_calls() | block_calls() | linear_calls() | loss_calls()
