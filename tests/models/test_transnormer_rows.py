"""Padding and packing change nothing: rows with either are the rows and documents alone, by the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtrain.models.transnormer.heads import TransNormerForMaskedLM, TransNormerForSequenceClassification
from kvtrain.models.transnormer.model import TransNormerModel

from .transnormer_reference import Reference, Rows, assert_like_reference, assert_near, random_rows, small_model

VARIANTS = pytest.mark.parametrize("variant", ["T1", "T2"])
WAYS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
NORMS = pytest.mark.parametrize("norm", ["rms", "batch"])
SHORT_AND_LONG = [[3, 12, 1, 5], [10, 7]]  # of documents, in blocks of 5


def pack(lengths: list[list[int]], width: int) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """Rows of documents, padded at the end: ids, documents' numbers, positions, and the documents alone."""
    rows = random_rows(*[length for row in lengths for length in row])
    ids, documents, positions = (torch.zeros(len(lengths), width, dtype=torch.long) for _ in range(3))
    rest = iter(rows)
    for index, row in enumerate(lengths):
        begin = 0
        for number, length in enumerate(row, start=1):
            place = slice(begin, begin + length)
            ids[index, place], documents[index, place] = next(rest), number
            positions[index, place], begin = torch.arange(length), begin + length
    return ids, documents, positions, rows


def unpack(hidden: Tensor, documents: Tensor) -> Rows:
    """The documents of ``(B, T, D)`` one by one."""
    return [
        row[numbers == number]
        for row, numbers in zip(hidden, documents, strict=True)
        for number in range(1, int(numbers.max()) + 1)
    ]


@VARIANTS
@WAYS
@NORMS
@pytest.mark.parametrize("told", [True, False], ids=["positions given", "positions derived"])
def test_packed_documents_are_rows_alone(variant, causal, norm, told):
    """Outputs and gradients of every weight; batch norm counts all real tokens, and no padding."""
    model = small_model(variant=variant, causal=causal, norm=norm, position_embedding="learned").train()
    ids, documents, positions, rows = pack(SHORT_AND_LONG, 24)
    told = {"position_ids": positions} if told else {}
    hidden = model.model(input_ids=ids, document_ids=documents, use_cache=False, **told).last_hidden_state
    assert_like_reference(model, unpack(hidden, documents), rows)


@VARIANTS
@WAYS
@settings(max_examples=6)
@given(data=st.data())
def test_documents_of_any_lengths(variant, causal, data):
    """With decay, in chunks' order of lengths or not, and positions that need no learning."""
    lengths = data.draw(st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=4), min_size=1, max_size=3))
    ids, documents, _, rows = pack(lengths, max(map(sum, lengths)) + data.draw(st.integers(0, 7)))
    model = small_model(TransNormerModel, variant=variant, causal=causal, decay="released")
    with torch.no_grad():
        found = unpack(model(ids, document_ids=documents).last_hidden_state, documents)
        for mine, its in zip(found, Reference(model).hidden(rows), strict=True):
            assert_near(mine, its)


@VARIANTS
@pytest.mark.parametrize("left", [0, 3, 6])
def test_packed_documents_behind_and_before_masked_tokens(variant, left):
    """A mask cuts documents short; those that remain count from their own first token."""
    ids, documents, _, _ = pack([[6, 9, 8]], 23)
    mask = torch.ones_like(ids)
    mask[:, :left] = mask[:, 20:] = 0
    rows = [row for row in unpack(ids[..., None], documents * mask) if len(row)]
    model = small_model(TransNormerModel, variant=variant, causal=False)
    hidden = model(ids, attention_mask=mask, document_ids=documents).last_hidden_state
    found = [row for row in unpack(hidden, documents * mask) if len(row)]
    assert_like_reference(model, found, [row[:, 0] for row in rows])


def pad(rows: Rows, width: int, offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Rows that begin so many columns from the left, among tokens 7; ids and mask."""
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for index, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        ids[index, offset : offset + len(row)], mask[index, offset : offset + len(row)] = row, 1
    return ids, mask


@VARIANTS
@WAYS
@NORMS
@pytest.mark.parametrize("offsets", [[6, 9, 13], [0, 0, 0], [2, 5, 11]], ids=["left", "right", "both sides"])
def test_padded_rows_are_rows_alone(variant, causal, norm, offsets):
    """In training mode, where batch norm's statistics come from the batch: of its real tokens."""
    model, rows = small_model(variant=variant, causal=causal, norm=norm).train(), random_rows(14, 11, 7)
    ids, mask = pad(rows, 20, offsets)
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    found = [row[real > 0] for row, real in zip(hidden, mask, strict=True)]
    assert_like_reference(model, found, rows)


@VARIANTS
@WAYS
@pytest.mark.parametrize("offset", [0, 4, 7])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_the_padding_of_a_single_row_counts(variant, causal, offset, positions):
    model, rows = small_model(variant=variant, causal=causal, position_embedding=positions), random_rows(13)
    ids, mask = pad(rows, 20, [offset])
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert_like_reference(model, [hidden[0, mask[0] > 0]], rows)
    ids[mask == 0] = 9
    other = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(other[mask > 0], hidden[mask > 0])


@VARIANTS
@WAYS
def test_the_statistics_that_batch_norm_remembers_are_of_real_tokens(variant, causal):
    settings_ = {"variant": variant, "causal": causal, "norm": "batch"}
    padded, alone, rows = small_model(**settings_).train(), small_model(**settings_).train(), random_rows(9, 9)
    ids, mask = pad(rows, 20, [3, 8])
    padded.model(input_ids=ids, attention_mask=mask, use_cache=False)
    alone.model(input_ids=torch.stack(rows), use_cache=False)
    remembered = dict(alone.named_buffers())
    for name, tensor in padded.named_buffers():
        assert_near(tensor.double(), remembered[name].double(), name)
    first = padded.model.layers[0].attention_norm
    before = small_model(**settings_).model.layers[0].attention_norm
    inputs = torch.cat([Reference(alone)._embed(row) for row in rows])
    assert_near(first.running_mean, 0.9 * before.running_mean + 0.1 * inputs.mean(0))
    assert_near(first.running_var, 0.9 * before.running_var + 0.1 * inputs.var(0))
    assert first.num_batches_tracked == 1


@VARIANTS
@WAYS
@NORMS
def test_a_row_of_padding_harms_nobody(variant, causal, norm):
    model, rows = small_model(variant=variant, causal=causal, norm=norm).train(), random_rows(14)
    ids, mask = pad([*rows, torch.empty(0, dtype=torch.long)], 16, [1, 0])
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert hidden.isfinite().all()
    assert_like_reference(model, [hidden[0, 1:15]], rows)
    model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.model.parameters())


@NORMS
def test_a_batch_of_padding_leaves_numbers(norm):
    """A rank may have nothing else."""
    model = small_model(TransNormerForSequenceClassification, norm=norm, causal=False, num_labels=3).train()
    ids, mask = torch.full((2, 6), 7), torch.zeros(2, 6, dtype=torch.long)
    out = model(ids, attention_mask=mask, labels=torch.tensor([-100, -100]))
    out.loss.backward()
    assert out.loss == 0 and out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_with_a_hole_is_refused(causal):
    model = small_model(causal=causal)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    with pytest.raises(ValueError, match="pad at the left or at the right"):
        model.model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match=r"pass the padding mask \(rows, tokens\)"):
        TransNormerModel.forward(model.model, torch.ones_like(mask), mask[:, None, None] == 0)


@VARIANTS
@WAYS
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_of_ones_is_no_mask(variant, causal, dtype):
    model, ids = small_model(variant=variant, causal=causal), torch.stack(random_rows(13, 13))
    named = {"input_ids": ids, "use_cache": False}
    masked = model.model(**named, attention_mask=torch.ones_like(ids, dtype=dtype)).last_hidden_state
    assert_near(masked, model.model(**named).last_hidden_state)


def test_learned_positions_end():
    model = small_model(TransNormerForMaskedLM, causal=False, position_embedding="learned", max_position_embeddings=10)
    with pytest.raises(ValueError, match="learnt 10 positions; shorten the input"):
        model(torch.stack(random_rows(11)))
    ids, documents, _, rows = pack([[10, 9, 4]], 40)  # more columns, and a longer tail, than positions
    hidden = model.model(ids, document_ids=documents).last_hidden_state
    assert_like_reference(model, unpack(hidden, documents), rows)
