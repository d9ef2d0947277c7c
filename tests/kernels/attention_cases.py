"""Random calls of ``attention`` and what they give, gradients included."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from kvtrain.kernels.attention import attention
from kvtrain.kernels.documents import Documents

# What architectures ask of every backend: nothing, DMC's bias on all keys but the own, LCKV's strict mask.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"bias": "finite", "bias_after": 1},
    "strict": {"strict": True},
}
HIDING = {name: kind | ({"bias": "hiding"} if kind.get("bias") else {}) for name, kind in KINDS.items()}


@dataclass
class Case:
    """One call: tensors that ask for gradients, the other arguments, and a seed for the loss."""

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def run(self, backend: str, *, use_lse: bool = True, chunk_size: int = 3) -> dict[str, torch.Tensor]:
        """Outputs and gradients of a random linear loss of them; a row that sees nothing adds no lse."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()}
        output, lse = attention(**leaves, **self.options, backend=backend, chunk_size=chunk_size)
        generator = torch.Generator().manual_seed(self.seed)
        loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
        weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
        if use_lse:
            loss = loss + (lse.masked_fill(lse == float("-inf"), 0.0) * weights).sum()
        loss.backward()
        grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
        return {"output": output.detach(), "lse": lse.detach(), **grads}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every tensor is there, finite (the log-sum-exp may be -inf) and close."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name != "lse":
            assert found[name].isfinite().all(), name
            assert tensor.isfinite().all(), name
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def make_case(
    seed: int,
    *,
    batch: int = 2,
    groups: int = 2,
    kv_heads: int = 2,
    num_queries: int = 7,
    num_keys: int | None = None,
    dim: int = 4,
    value_dim: int | None = None,
    bias: str = "none",
    documents: str = "none",
    sinks: bool = False,
    empty: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    """Normal tensors; ``bias`` is none, finite or hiding (a third is -inf), ``documents`` none, shared or foreign,
    ``sinks`` a mask of random keys, ``empty`` the tensors whose last channel is 0, as DMC's queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_queries if num_keys is None else num_keys

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, 3, (batch, length), generator=generator).sort(-1).values

    tensors = {
        "query": normal(batch, kv_heads * groups, num_queries, dim),
        "key": normal(batch, kv_heads, num_keys, dim),
        "value": normal(batch, kv_heads, num_keys, value_dim or dim),
    }
    for name in empty:
        tensors[name][..., -1] = 0
    if bias != "none":
        tensors["key_bias"] = -normal(batch, kv_heads, num_keys).abs() * 3
    if bias == "hiding":
        hidden = torch.rand((batch, kv_heads, num_keys), generator=generator) < 1 / 3
        tensors["key_bias"] = tensors["key_bias"].masked_fill(hidden, float("-inf"))
    if documents == "shared":
        options["documents"] = Documents(ids(num_queries))
    elif documents == "foreign":
        options["documents"] = Documents(ids(num_queries), ids(num_keys))
    if sinks:
        options["sinks"] = torch.rand((batch, num_keys), generator=generator) < 1 / 4
    return Case(tensors, options, seed)


@st.composite
def cases(draw: st.DrawFn, *, square: bool) -> Case:
    """Any call (``square=False``), or one that the CPU flash kernel can run."""
    causal = square or draw(st.booleans())
    strict = causal and draw(st.integers(0, 2)) == 0
    bias_after = draw(st.sampled_from([0, 1, 1, 2, 5] if square else [0, 1, 2, 5])) if causal else 0
    biases = ["none", "finite", "hiding"] if not square or (bias_after == 1 and not strict) else ["none"]
    window = draw(st.none() | st.integers(1, 9)) if causal else None
    num_queries = draw(st.integers(2 if square else 1, 17))
    sinks = draw(st.booleans()) if window else False
    return make_case(
        draw(st.integers(0, 10**6)),
        batch=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 2, 4])),
        kv_heads=draw(st.integers(1, 2)),
        num_queries=num_queries,
        num_keys=num_queries if square else draw(st.integers(1, 17)),
        dim=draw(st.sampled_from([2, 5, 8])),
        value_dim=None if square else draw(st.sampled_from([None, 3])),
        bias=draw(st.sampled_from(biases)),
        documents=draw(st.sampled_from(["none", "shared" if square else "foreign"])),
        causal=causal,
        strict=strict,
        bias_after=bias_after,
        window=window,
        sink=draw(st.integers(0, 4)) if window and not sinks else 0,
        sinks=sinks,
        empty=draw(st.sampled_from([(), ("query",), ("key",), ("query", "key")])),
        scale=draw(st.sampled_from([None, 0.7])),
    )
