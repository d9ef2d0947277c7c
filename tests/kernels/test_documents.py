"""Documents: where they lie, and that what kernels derive from them is derived once."""

import gc
import itertools
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kvtrain.kernels import attention_flex, cpu_tiling
from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_mask import AttentionMask
from kvtrain.kernels.attention_mixed import mixed_attention, window_attention
from kvtrain.kernels.compensation import dropped_by_window
from kvtrain.kernels.documents import Documents
from kvtrain.models.context import document_positions

CPU = torch.device("cpu")
IDS = torch.tensor([[7, 7, 0, 0, 0, 2], [1, 1, 1, 1, 1, 1]])


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def slices(*edges: int) -> list[slice]:
    return [slice(*run) for run in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        (IDS.tolist(), [slices(0, 2, 5, 6), slices(0, 6)]),
        ([[3, 3, 3]], [slices(0, 3)]),
        ([[3, 2, 1]], [slices(0, 1, 2, 3)]),
        ([[1, 2, 1]], None),
        ([[1, 1, 2], [0, 2, 0]], None),
        ([[4], [5]], [slices(0, 1), slices(0, 1)]),
        ([], []),
    ],
    ids=["several and one", "one", "of a token each", "comes again", "comes again in one row", "tokens", "no row"],
)
def test_where_documents_lie(ids: list[list[int]], runs: list[list[slice]] | None):
    documents = Documents(torch.tensor(ids, dtype=torch.long).view(len(ids), -1 if ids else 3))
    assert documents.runs == runs
    assert documents.runs is documents.runs


@settings(max_examples=100)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
def test_runs_are_the_documents(rows: int, length: int, seed: int):
    ids = torch.randint(0, 3, (rows, length), generator=torch.Generator().manual_seed(seed))
    runs = Documents(ids).runs
    apart = all(len(row.unique_consecutive()) == len(row.unique()) for row in ids)
    assert (runs is not None) == apart
    for row, parts in zip(ids.tolist(), runs or [], strict=False):
        assert [token for part in parts for token in range(length)[part]] == list(range(length))
        assert all(len(set(row[part])) == 1 for part in parts)
        assert len(parts) == len(set(row))


def test_of_nothing_and_of_other_keys():
    assert Documents.of(None) is None
    documents = Documents.of(IDS)
    assert documents is not None and documents.same_tokens and documents.keys is IDS
    assert not Documents(IDS, IDS.clone()).same_tokens
    part = documents.part(2, 5)
    assert torch.equal(part.queries, IDS[:, 2:]) and torch.equal(part.keys, IDS[:, :5])
    assert documents.part(2, 5) is part and documents.part(2, 4) is not part


def test_borders_are_those_of_all_rows_also_where_few_are_worked_on():
    documents = Documents(IDS.repeat(3, 1))
    with cpu_tiling.without_values():
        assert documents.runs is not None and len(documents.runs) == 6
    assert documents.runs == Documents(IDS.repeat(3, 1)).runs


def test_layers_backward_and_recomputation_find_the_borders_of_the_first():
    """Three layers under activation checkpointing: one look at the ids, whose values every look would wait for."""
    states = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    documents = Documents(IDS)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return attention(hidden, hidden, hidden, documents=documents, backend="flash_cpu")[0]

    with Operations() as operations:
        hidden = states
        for _ in range(3):
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        hidden.sum().backward()
    assert operations.counts["nonzero"] == 1
    assert operations.counts["_scaled_dot_product_flash_attention_for_cpu"] == 3 * 2 * 4  # documents one by one


def test_what_windows_hide_is_found_once():
    heads, gates = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3])
    told = {"window": 2, "sink": 1, "position_ids": document_positions(IDS), "documents": Documents(IDS)}

    def layer() -> list[torch.Tensor]:
        sums = dropped_by_window(heads, heads, **told)
        return [mixed_attention(heads, heads, heads, gates, **told), *window_attention(*[heads] * 3, **told), *sums]

    with Operations() as first:
        found = layer()
    with Operations() as second:
        again = layer()
    assert first.counts["cummax"] == 1 and second.counts["cummax"] == 0
    assert first.counts["lt"] > second.counts["lt"]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_block_mask_is_made_once_for_each_kind_of_mask():
    documents = Documents(IDS.repeat(1, 50))
    plain, windowed = AttentionMask(documents=documents), AttentionMask(window=40, documents=documents)
    blocks = attention_flex.block_mask(plain, 300, CPU)
    assert attention_flex.block_mask(plain._replace(bias_after=3), 300, CPU) is blocks
    assert attention_flex.block_mask(windowed, 300, CPU) is not blocks
    assert attention_flex.block_mask(windowed, 300, CPU) is attention_flex.block_mask(windowed, 300, CPU)
    assert attention_flex.block_mask(plain._replace(documents=Documents(IDS.repeat(1, 50))), 300, CPU) is not blocks


def test_what_inference_has_asked_for_serves_training():
    positions = torch.arange(6)[None]
    with torch.inference_mode():
        documents = Documents(IDS.clone())
        sinks = documents.keep("sinks", lambda: positions < 2)
        mask = AttentionMask(window=3, sinks=sinks, documents=documents)
        blocks = attention_flex.block_mask(mask, 6, CPU)
    assert documents.queries.is_inference() and not sinks.is_inference()
    assert blocks is not None and not blocks.kv_indices.is_inference()
    captured = [cell.cell_contents for cell in blocks.mask_mod.__closure__ or ()]
    tensors = [content for content in captured if isinstance(content, torch.Tensor)]
    assert len(tensors) == 3 and not any(tensor.is_inference() for tensor in tensors)
    assert blocks is attention_flex.block_mask(mask, 6, CPU)


def test_nothing_outlives_the_documents():
    """What is kept goes with them at once, and not when Python looks for circles: it lies on the device."""
    documents = Documents(IDS)
    gone = weakref.ref(documents)
    gc.disable()
    try:
        assert documents.runs and documents.part(1, 2)
        assert attention_flex.block_mask(AttentionMask(documents=documents), 6, CPU) is not None
        del documents
        assert gone() is None
    finally:
        gc.enable()
