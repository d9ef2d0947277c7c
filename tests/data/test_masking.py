"""Masked rows: which tokens become targets, what stands in their place, and that resuming and ranks change neither."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data import masking
from kvtrain.data.loader import PackedLoader
from kvtrain.data.masking import MaskedDataModule, MaskedLoader, Masking
from kvtrain.data.packing import IGNORE_INDEX, PackedRows
from kvtrain.data.shards import TokenShards

from .conftest import fill

PROPERTY = settings(max_examples=20)
LENGTH, SIZE = 32, 500
START, SPECIAL, MASK = 0, 1, 2  # of the text: how documents begin and end, what is inside some, and what hides
MASKING = Masking(MASK, frozenset({START, SPECIAL}), SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of all lengths between special tokens, with others inside, in several shards."""
    rng = np.random.default_rng(0)
    documents = []
    for size in rng.integers(1, 90, 120):
        words = np.where(rng.random(size) < 0.1, SPECIAL, rng.integers(3, SIZE, size))
        documents.append([START, *words.tolist(), START])
    target = tmp_path_factory.mktemp("text")
    fill(target, documents, 1500, SIZE)
    return target


@pytest.fixture(scope="module")
def rows(folder):
    packed = PackedRows(TokenShards(folder), LENGTH)
    assert len(packed) > 150 and len(packed.shards.tokens) > 2
    return packed


def loader_of(rows, batch_size=4, masks=MASKING, seed=0, **place):
    return MaskedLoader(rows, batch_size, masking=masks, seed=seed, **place)


def plain(rows, batch):
    """The same rows unmasked."""
    return rows.batch(batch["row_ids"].numpy())


def may_be_masked(rows, batch):
    """By definition: neither special, nor padding, nor the first token of a document or a row."""
    original = plain(rows, batch)
    ordinary = torch.isin(original["input_ids"], torch.tensor([START, SPECIAL, MASK]), invert=True)
    return ordinary & (original["document_ids"] > 0) & (original["position_ids"] > 0)


def by_row(batches):
    """What the model is given of every row."""
    return {
        number: (ids, labels)
        for batch in batches
        for number, ids, labels in zip(
            batch["row_ids"].tolist(), batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
        )
    }


def run(loader, count):
    """So many batches, over epochs."""
    batches = []
    while len(batches) < count:
        batches += islice(loader, count - len(batches))
    return batches


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# One batch.


@pytest.mark.parametrize("seed", [0, None])
def test_targets_stand_where_they_stood_and_nothing_else_changes(rows, seed):
    for batch in loader_of(rows, seed=seed):
        original, allowed = plain(rows, batch), may_be_masked(rows, batch)
        targets = batch["labels"] != IGNORE_INDEX
        assert not (targets & ~allowed).any()
        assert torch.equal(batch["labels"][targets], original["input_ids"][targets])
        assert torch.equal(batch["input_ids"][~targets], original["input_ids"][~targets])
        assert all(torch.equal(batch[name], original[name]) for name in ("position_ids", "document_ids"))
        seen = batch["input_ids"][targets]
        assert (seen != START).all() and (seen != SPECIAL).all() and (seen < SIZE).all()
        assert {batch[name].dtype for name in ("input_ids", "labels")} == {torch.long}


@pytest.mark.parametrize("probability", [0.15, 0.4, 1.0])
def test_every_row_has_its_share_of_targets(rows, probability):
    """To the nearest whole token; at least one, where a token may be masked at all."""
    masks = Masking(MASK, MASKING.special_ids, SIZE, probability)
    for batch in loader_of(rows, masks=masks):
        counts = may_be_masked(rows, batch).sum(1).tolist()
        expected = [min(count, max(1, round(probability * count))) for count in counts]
        assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == expected


def test_a_row_without_ordinary_tokens_has_no_target(write_shards):
    packed = PackedRows(write_shards([[START, SPECIAL, SPECIAL, 7], [START, SPECIAL, SPECIAL, SPECIAL]]), 4)
    batch = next(iter(loader_of(packed, batch_size=2)))
    found = by_row([batch])
    assert found[0][1] == [IGNORE_INDEX] * 3 + [7]
    assert found[1] == ([START, SPECIAL, SPECIAL, SPECIAL], [IGNORE_INDEX] * 4)
    assert int(batch["num_items"]) == 1


@pytest.mark.parametrize(("mask_share", "random_share"), [(0.8, 0.1), (0.5, 0.5), (0.0, 0.3), (1.0, 0.0)])
def test_targets_are_hidden_replaced_or_kept_in_their_shares(rows, mask_share, random_share):
    """Over 40 epochs; a random token is the same one once in five hundred times."""
    masks = Masking(MASK, MASKING.special_ids, SIZE, 0.15, mask_share, random_share)
    loader = loader_of(rows, masks=masks)
    batches = run(loader, 40 * len(loader))
    seen = torch.cat([batch["input_ids"][batch["labels"] != IGNORE_INDEX] for batch in batches])
    truth = torch.cat([batch["labels"][batch["labels"] != IGNORE_INDEX] for batch in batches])
    hidden, kept = seen == MASK, seen == truth
    assert len(seen) > 15_000
    for share, expected in (
        (hidden, mask_share),
        (kept, 1 - mask_share - random_share),
        (~hidden & ~kept, random_share),
    ):
        assert abs(share.double().mean().item() - expected) < 0.012
    strangers = seen[~hidden & ~kept]
    assert len(strangers) == 0 or (strangers.min() == 3 and strangers.max() == SIZE - 1)


def test_every_ordinary_token_is_a_target_in_its_turn(rows):
    """As often as any other of its row: 15 % of 400 epochs."""
    batch, times = next(iter(loader_of(rows, 1, seed=None))), 400
    counts = torch.zeros(LENGTH)
    for epoch in range(times):
        masked = plain(rows, batch)
        MASKING.apply(masked, 0, (epoch,))
        counts += (masked["labels"] != IGNORE_INDEX)[0]
    allowed = may_be_masked(rows, batch)[0]
    assert (counts[~allowed] == 0).all() and counts.sum() == times * round(0.15 * int(allowed.sum()))
    expected = counts.sum() / allowed.sum()
    assert ((counts[allowed] - expected).abs() < 5 * expected**0.5).all()


# Epochs, seeds, resuming and ranks.


def test_masks_change_with_the_epoch_and_the_seed_alone(rows):
    """The row has a mask wherever it is served: whatever the batch, the window and the ranks."""
    loader = loader_of(rows, 1)
    first, second = (by_row(run(loader, len(loader))) for _ in range(2))
    other = by_row(loader_of(rows, 1, seed=1))
    assert len(first) == len(second) == len(other) == len(rows)
    for masks in (second, other):
        assert sum(masks[row][1] != first[row][1] for row in first) > 0.9 * len(rows)
    ranks = [by_row(loader_of(rows, 2, window=3, rank=rank, world_size=3)) for rank in range(3)]
    served = {row: masked for rank in ranks for row, masked in rank.items()}
    assert len(served) == sum(map(len, ranks)) > 0.8 * len(rows)
    assert all(first[row] == masked for row, masked in served.items())


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 250))
def test_resuming_anywhere(rows, batch_size, window, world_size, taken):
    """Inside windows and at the ends of epochs, to the bit, ``num_items`` among it."""
    place = {"batch_size": batch_size, "window": window, "rank": world_size - 1, "world_size": world_size, "seed": 3}
    first = loader_of(rows, **place)
    run(first, taken)
    resumed = loader_of(rows, **place)
    resumed.load_state_dict(first.state_dict())
    torch.manual_seed(taken)
    assert all(map(same, run(resumed, 20), run(first, 20)))
    assert resumed.state_dict() == first.state_dict()


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_windows_count_their_targets_over_all_ranks(rows, batch_size, window, world_size):
    """In the second epoch too, when no row is read for it any more."""
    loaders = [
        loader_of(rows, batch_size, window=window, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    everyone = [run(loader, 2 * len(loader)) for loader in loaders]
    for start in range(0, len(everyone[0]), window):
        together = [batch for batches in everyone for batch in batches[start : start + window]]
        targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in together)
        assert {int(batch["num_items"]) for batch in together} == {targets} and targets > 0


def test_large_windows_are_counted_as_small_ones(rows):
    """More rows than are read at once."""
    assert len(rows) > 2 * masking._READ
    whole = next(iter(loader_of(rows, 1, window=len(rows))))
    assert int(whole["num_items"]) == sum(int(batch["num_items"]) for batch in loader_of(rows, 1))


def test_rows_are_served_in_the_order_of_the_plain_loader(rows):
    masked, unmasked = (
        [batch["row_ids"].tolist() for batch in loader] for loader in (loader_of(rows), PackedLoader(rows, 4, seed=0))
    )
    assert masked == unmasked


def test_a_loader_draws_nothing_from_the_global_generators(rows):
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    run(loader_of(rows), 5)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_held_out_masks_never_change(rows, world_size):
    """Nor are they those of the training; a rank past the end gets a row without targets."""
    expected = by_row(loader_of(rows, 13, seed=None, limit=13))
    loaders = [loader_of(rows, 5, seed=None, rank=rank, world_size=world_size, limit=13) for rank in range(world_size)]
    for _ in range(2):
        batches = [batch for loader in loaders for batch in loader]
        served = [batch for batch in batches if (batch["labels"] != IGNORE_INDEX).any()]
        assert by_row(served) == expected and sorted(expected) == list(range(13))
        assert all("num_items" not in batch for batch in batches)
    trained = by_row(loader_of(rows, 1))
    assert sum(trained[row][1] != expected[row][1] for row in expected) > 10
    (padding,) = loader_of(rows, 13, seed=None, rank=1, world_size=2, limit=13)
    assert (padding["labels"] == IGNORE_INDEX).all() and (padding["document_ids"] == 0).all()
    assert torch.equal(padding["input_ids"], plain(rows, padding)["input_ids"])


# The data module.


def module(folder, **options):
    sizes = {"sequence_length": LENGTH, "batch_size": 4, "validation_rows": 5, "mask_token_id": 1}
    return MaskedDataModule("kvtrain:tiny", str(folder), str(folder), **{**sizes, **options})


def test_the_data_module_asks_its_tokenizer_and_its_trainer(folder, rows):
    data = module(folder, seed=4, mask_probability=0.3, mask_share=0.5, random_share=0.25)
    data.prepare_data()
    assert data.masking == Masking(1, frozenset({0, 1}), 4096, 0.3, 0.5, 0.25)
    held_out = loader_of(rows, 4, data.masking, seed=None, limit=5)
    assert all(map(same, data.val_dataloader(), held_out)) and len(data.val_dataloader()) == 2
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=3, global_rank=1, world_size=2, distributed_sampler_kwargs=None
    )
    place = {"rank": 1, "world_size": 2}
    train, expected = data.train_dataloader(), loader_of(rows, 4, data.masking, seed=4, window=3, **place)
    assert all(map(same, train, expected)) and len(train) == len(expected) > 10
    held_out = loader_of(rows, 4, data.masking, seed=None, limit=5, **place)
    assert all(map(same, data.val_dataloader(), held_out)) and len(data.val_dataloader()) == 1


def with_tokenizer(monkeypatch, tokenizer, **changes):
    """A data module whose tokenizer is the packaged one but for some attributes."""
    names = ("mask_token_id", "pad_token_id", "pad_token", "bos_token_id", "eos_token_id", "all_special_ids")
    told = {name: getattr(tokenizer, name) for name in (*names, "added_tokens_decoder")}

    class Other(SimpleNamespace):
        def __len__(self):
            return 300

    monkeypatch.setattr(masking, "load_tokenizer", lambda name: Other(**{**told, **changes}))
    return MaskedDataModule(corpus="nowhere")


def test_a_tokenizers_own_mask_token_is_taken(monkeypatch, tokenizer):
    special = SimpleNamespace(special=True), SimpleNamespace(special=False)
    changes = {
        "mask_token_id": 7,
        "all_special_ids": [0, 1, 7],
        "added_tokens_decoder": dict(zip((8, 9), special, strict=True)),
    }
    data = with_tokenizer(monkeypatch, tokenizer, **changes)
    assert data.masking == Masking(7, frozenset({0, 1, 7, 8}), 300)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, r"'kvtrain:tiny' has no mask token; set mask_token_id .*: 1 \(<\|pad\|>, which"),
        ({"pad_token_id": None}, "an id that no text has: 300 with a model of vocab_size 301"),
        ({"pad_token_id": 0}, "an id that no text has: 300 with a model of vocab_size 301"),
        ({"mask_token_id": 0}, "mask_token_id 0 begins or ends documents; take an id that no text has"),
    ],
)
def test_a_mask_token_must_be_found_before_anything_is_tokenised(monkeypatch, tokenizer, changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        with_tokenizer(monkeypatch, tokenizer, **changes).prepare_data()


def test_prepared_folders_need_their_tokenizer_too(folder):
    data = module(folder)
    data.tokenizer_name = None
    with pytest.raises(ValueError, match="must know the special tokens; set tokenizer"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"mask_probability": 0.0}, "mask_probability must be above 0 and at most 1, not 0.0"),
        ({"mask_probability": 1.1}, "mask_probability must be above 0 and at most 1, not 1.1"),
        ({"mask_share": 0.95}, "together at most 1, not 0.95 and 0.1"),
        ({"mask_share": -0.1}, "together at most 1, not -0.1 and 0.1"),
        ({"random_share": -0.1}, "together at most 1, not 0.8 and -0.1"),
        ({"mask_token_id": -1}, "mask_token_id must not be negative, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(folder, options, remedy):
    with pytest.raises(ValueError, match=remedy):
        module(folder, **options)
