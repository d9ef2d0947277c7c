"""FlexAttention, traced as for the GPU and run without Triton, and the blocks that its mask is made of."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from kvtrain.kernels import attention_flex
from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_mask import AttentionMask, visible_pairs
from kvtrain.kernels.documents import Documents
from tests.thinning import thinned

from .attention_cases import assert_same, make_case

PROPERTY = settings(max_examples=600)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def _traced() -> Iterator[None]:
    """Dynamo and AOTAutograd as on the GPU, the dense form of the operator instead of its Triton kernels."""
    torch.compiler.reset()
    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "_compiled", lambda: compiled)
        patch.setattr(attention_flex, "_on_gpu", lambda tensor: True)
        patch.setattr(attention_flex, "_DTYPES", (torch.float64,))
        patch.setattr(torch_flex, "_validate_device", lambda *_: None)  # it refuses gradients on the CPU
        yield
    torch.compiler.reset()


# Four have every option between them; each is a compilation.
GATING = ("strict, documents", "all of it", "both ways, hiding, documents", "one row, ungrouped")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"bias": "finite", "bias_after": 1},
    "biased far back": {"bias": "finite", "bias_after": 5},
    "biased, hiding, documents": {"bias": "hiding", "bias_after": 2, "documents": "shared"},
    "strict, documents": {"strict": True, "documents": "shared"},
    "window and sink": {"window": 40, "sink": 3},
    "all of it": {"bias": "finite", "bias_after": 3, "window": 140, "sink": 2, "documents": "foreign"},
    "both ways": {"causal": False},
    "both ways, hiding, documents": {"causal": False, "bias": "hiding", "documents": "foreign"},
    "blind": {"strict": True, "window": 1},
    "one row, ungrouped": {"batch": 1, "groups": 1, "bias": "finite", "bias_after": 1, "scale": 0.7},
}


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("name", thinned(CASES, GATING))
def test_flex_is_the_definition(name: str):
    """Outputs and gradients, at a first length and at another, which torch traces for any length."""
    for seed, length in enumerate((131, 257, 300)):
        case = make_case(seed, num_queries=length, dim=16, **CASES[name])
        for use_lse in (True, False):
            assert_same(case.run("flex", use_lse=use_lse), case.run("reference", use_lse=use_lse), 1e-10)


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize(
    "options",
    [
        {"num_queries": 127},
        {"num_queries": 129, "num_keys": 130},
        {"dim": 15},
        {"value_dim": 15},
        {"dtype": torch.bfloat16},
        {"batch": 0},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know_is_refused(options: dict[str, Any]):
    case = make_case(1, **{"num_queries": 130, "dim": 16, **options})
    with pytest.raises(ValueError, match="attention: backend 'flex' cannot run this call; use 'auto' or one of"):
        attention(**case.tensors, **case.options, backend="flex")


def test_the_cpu_has_no_flex():
    case = make_case(2, num_queries=130, dim=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="backend 'flex' cannot run this call; use 'auto' or one of"):
        attention(**case.tensors, backend="flex")


class DropsGradient(torch.autograd.Function):
    """What FlexAttention did to captured views."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def test_a_lost_gradient_is_an_error():
    bias = torch.ones(3, requires_grad=True)
    captured = attention_flex._Captured.apply(bias.view(3))
    assert not captured._is_view() and captured.data_ptr() != bias.data_ptr()
    with pytest.raises(RuntimeError, match="FlexAttention lost the gradient of the key bias; use backend='chunked'"):
        DropsGradient.apply(captured).backward()


def test_a_mask_of_inference_serves_training():
    attention_flex._positional.cache_clear()
    with torch.inference_mode():
        mask = attention_flex.block_mask(AttentionMask(window=7), 300, CPU)
    assert mask is attention_flex.block_mask(AttentionMask(window=7), 300, CPU)
    assert mask is not None and not mask.kv_indices.is_inference() and not mask.q_indices.is_inference()


@st.composite
def masks(draw: st.DrawFn) -> tuple[AttentionMask, int, int]:
    """A mask, a length and a size of blocks; ids of documents in any order."""
    length, block = draw(st.integers(1, 23)), draw(st.integers(1, 6))
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 9)) if causal else None
    documents = None
    if draw(st.booleans()):
        ids = st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=2, max_size=2)
        sides = [torch.tensor(draw(ids)), torch.tensor(draw(ids))]
        documents = Documents(*(ids.sort(-1).values for ids in sides) if draw(st.booleans()) else sides)
    strict = causal and draw(st.booleans())
    sinks = None
    if window is not None and draw(st.booleans()):
        flags = st.lists(st.booleans(), min_size=length, max_size=length)
        sinks = torch.tensor(draw(st.lists(flags, min_size=2, max_size=2)))
    sink = draw(st.integers(0, 4)) if sinks is None else 0
    return AttentionMask(causal, strict, 0, window, sink, documents, sinks), length, block


def dense(mask: AttentionMask, length: int) -> torch.Tensor:
    """``(B or 1, T, T)``."""
    positions = torch.arange(length)
    sinks = None if mask.sinks is None else mask.sinks[:, None]
    visible = visible_pairs(positions[:, None], positions, mask, sinks)
    visible = visible if visible.dim() == 3 else visible[None]
    if mask.documents is None:
        return visible
    return visible & (mask.documents.queries[:, :, None] == mask.documents.keys[:, None])


@PROPERTY
@given(masks())
def test_blocks_say_what_their_pairs_say(drawn: tuple[AttentionMask, int, int]):
    """No visible pair is skipped and no hidden one goes unmasked; by positions alone, nothing is run in vain."""
    mask, length, block = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "_BLOCK", block)
        some, every = attention_flex._visible_blocks(mask, length, CPU)
    pairs = dense(mask, length)
    for row, row_start in enumerate(range(0, length, block)):
        for column, column_start in enumerate(range(0, length, block)):
            inside = pairs[:, row_start : row_start + block, column_start : column_start + block].flatten(1)
            whole = inside.shape[1] == block * block
            assert (some[:, row, column] | ~inside.any(1)).all()
            assert (~every[:, row, column] | (inside.all(1) & whole)).all()
            one = mask.strict and mask.window == 1
            if mask.documents is None and mask.sinks is None and not one:
                assert torch.equal(some[:, row, column], inside.any(1))
                assert mask.sink or torch.equal(every[:, row, column], inside.all(1) & whole)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(),
        AttentionMask(strict=True),
        AttentionMask(window=300),
        AttentionMask(window=310, sink=200),
        AttentionMask(causal=False, documents=Documents(torch.arange(700)[None] // 256)),
        AttentionMask(bias_after=1, documents=Documents(torch.arange(1400).view(2, 700) // 300)),
        AttentionMask(window=310, sinks=torch.arange(700)[None] % 300 < 20),
    ],
    ids=["causal", "strict", "window", "sink", "documents", "rows", "sinks"],
)
def test_the_mask_is_the_one_that_torch_finds_pair_by_pair(mask: AttentionMask):
    blocks = attention_flex.block_mask(mask, 700, CPU)
    rows = None if mask.documents is None else len(mask.documents.queries)
    expected = torch_flex.create_block_mask(attention_flex._mask_mod(mask), rows, None, 700, 700, device="cpu")
    assert blocks is not None and blocks.shape == expected.shape
    kinds = [(f"{full}{side}_num_blocks", f"{full}{side}_indices") for full in ("", "full_") for side in ("kv", "q")]
    for counts, indices in kinds:
        assert torch.equal(getattr(blocks, counts), getattr(expected, counts)), counts
        listed = torch.arange(6) < getattr(blocks, counts)[..., None]
        assert torch.equal(getattr(blocks, indices)[listed], getattr(expected, indices)[listed]), indices
    assert blocks.full_kv_num_blocks.sum() > 0


def test_seeing_everything_needs_no_mask():
    assert attention_flex.block_mask(AttentionMask(causal=False), 300, CPU) is None


@pytest.mark.parametrize(
    ("able", "taken"),
    [({"flash", "flex"}, ["flash"]), ({"flash"}, ["flash"]), ({"flex"}, ["flex"]), (set(), [])],
    ids=["both", "flash", "flex", "neither"],
)
def test_auto_prefers_flash_to_flex_to_chunks(monkeypatch: pytest.MonkeyPatch, able: set[str], taken: list[str]):
    calls: list[str] = []
    monkeypatch.setattr("kvtrain.kernels.attention.flash_cpu_can_run", lambda *_: False)
    for name in ("flash", "flex"):
        monkeypatch.setattr(f"kvtrain.kernels.attention.{name}_can_run", lambda *_, n=name: n in able)
        monkeypatch.setattr(f"kvtrain.kernels.attention.{name}_attend", lambda *_, n=name: calls.append(n))
    attention(**make_case(3).tensors)
    assert calls == taken
