"""Batches of passkeys, names, runs and text: their place, sizes and targets, and what each rank is served."""

import functools
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data import recall
from kvtrain.data.loader import PackedLoader
from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.data.passkey import WORDS, PasskeyTask
from kvtrain.data.recall import RecallDataModule, RecallLoader, RetrievalDataModule
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.data.tokenizer import load_tokenizer

from .conftest import fill

PROPERTY = settings(max_examples=25)
# Tokens of the training text and of the held-out one, which no tokenizer has.
TEXT, HELDOUT = range(10**6, 10**6 + 6000), range(2 * 10**6, 2 * 10**6 + 3000)
LONGEST, BATCH = 256, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Text in three shards of very different size, and held-out text."""
    made = []
    for name, tokens in (("text", TEXT), ("heldout", HELDOUT)):
        folder = tmp_path_factory.mktemp(name)
        bounds = [0, len(tokens) // 2, len(tokens) - 300, len(tokens)]
        documents = [list(tokens[begin:end]) for begin, end in pairwise(bounds)]
        fill(folder, documents, 100, vocab_size=3 * 10**6)
        made.append(str(folder))
    return made


@pytest.fixture(scope="module", autouse=True)
def _one_tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "load_tokenizer", functools.cache(load_tokenizer))
        yield


@pytest.fixture(scope="module")
def make(folders):
    """The data module, with small passkeys."""

    def module(**options):
        sizes = {"sequence_length": LONGEST, "batch_size": BATCH, "task": PasskeyTask(passkeys=2, words=2)}
        return RecallDataModule("kvtrain:tiny", *folders, **{**sizes, **options})

    return module


def loader_of(data, validation_rows=None, **place):
    corpora = data.corpora if validation_rows is None else data.validation_corpora
    return RecallLoader(data, data.shards(corpora), validation_rows=validation_rows, **place)


def take(loader, count):
    return list(islice(loader, count))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows_of(batches):
    """All rows' tokens."""
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def is_passkey(row):
    """Whether it is a passkey sample: those begin with the tokenizer's first token, runs with any other."""
    return row[0] == 0


# One batch.


@pytest.mark.parametrize("copy_share", [0.0, 0.5])
def test_a_batch_has_one_length_and_fills_its_budget(make, copy_share):
    loader, lengths = loader_of(make(shortest=96, copy_share=copy_share)), set()
    for number, batch in enumerate(take(loader, 60)):
        rows, length = batch["input_ids"].shape
        lengths.add(length)
        assert length == loader.length(number) and length % 16 == 0 and 96 <= length <= LONGEST
        assert rows * length <= BATCH * LONGEST < (rows + 1) * length
        assert batch["labels"].shape == (rows, length)
        assert torch.equal(batch["document_ids"], torch.ones(rows, length, dtype=torch.long))
        assert torch.equal(batch["position_ids"], torch.arange(length).expand(rows, -1))
        assert {tensor.dtype for tensor in batch.values()} == {torch.long}
        learnt = batch["labels"] != IGNORE_INDEX
        assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
        assert learnt.any(1).all()
    assert lengths - {LONGEST} == set(range(96, LONGEST, 16))


def test_one_length_where_none_is_said(make):
    loader = loader_of(make())
    assert {loader.length(number) for number in range(300)} == {LONGEST}
    assert {batch["input_ids"].shape for batch in take(loader, 5)} == {(BATCH, LONGEST)}


def test_lengths_grow_by_equal_factors(make):
    """Up to the longest so far, from the first batch on; afterwards up to the longest of all."""
    loader = loader_of(make(sequence_length=512, shortest=64, growth_batches=300, copy_share=1.0))
    lengths = np.asarray([loader.length(number) for number in range(3000)])
    limits = 64 * 8 ** (np.arange(300) / 300)
    assert (lengths[:300] <= np.rint(limits)).all() and (lengths >= 64).all() and lengths[0] == 64
    for begin in range(0, 300, 50):  # and reaches it
        assert lengths[begin : begin + 50].max() > 0.85 * limits[begin] - 16
    assert lengths[250:300].max() > 300 > lengths[:200].max()
    grown = lengths[300:]
    assert abs(grown.mean() - 288 + 8) < 8 and set(grown) == set(range(64, 513, 16))


def test_a_haystack_is_a_run_of_text_from_anywhere(make):
    """From every shard, in proportion to its size."""
    begins = []
    for row in rows_of(take(loader_of(make()), 300)):
        book = [token for token in row if token >= TEXT[0]]
        assert book == list(range(book[0], book[0] + len(book)))
        begins.append(book[0] - TEXT[0])
    shares = np.histogram(begins, [0, 3000, 5700, 6000])[0] / len(begins)
    assert len(set(begins)) > 450 and np.allclose(shares, [0.5, 0.45, 0.05], atol=0.06)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.24, 0.36), (1.0, 1.0, 1.0)])
def test_runs_to_be_copied_stand_beside_passkeys(make, tokenizer, share, low, high):
    words = {token for word in WORDS for token in tokenizer(" " + word, add_special_tokens=False)["input_ids"]}
    runs = []
    rows = [row for batch in take(loader_of(make(copy_share=share)), 300) for row in zip(*columns(batch), strict=True)]
    for ids, labels in rows:
        if is_passkey(ids.tolist()):
            continue
        run = int((labels != IGNORE_INDEX).int().argmax()) - 1
        assert torch.equal(ids[run:], ids[:-run])
        assert (labels[run + 1 :] == ids[run + 1 :]).all()
        assert min(ids.tolist()) >= TEXT[0] or set(ids.tolist()) <= words
        runs.append(run)
    assert low <= len(runs) / len(rows) <= high
    assert not runs or (max(runs) > 100 and min(runs) < 20)


def columns(batch):
    return batch["input_ids"], batch["labels"]


@pytest.mark.parametrize(
    ("share", "window", "expected"), [(0.5, 1, "sTsTsTsT"), (0.25, 2, "ssssssTT"), (0.75, 1, "sTTTsTTT")]
)
def test_steps_on_text_stand_between_those_on_samples(make, share, window, expected):
    """All micro-batches of a step are of one sort; text is packed rows in the order of a run on text alone."""
    data = make(text_share=share)
    batches = take(loader_of(data, window=window), 8)
    sorts = ["s" if is_passkey(batch["input_ids"][0].tolist()) else "T" for batch in batches]
    assert "".join(sorts) == expected
    text = [batch for batch, sort in zip(batches, sorts, strict=True) if sort == "T"]
    alone = PackedLoader(data.rows(data.corpora), BATCH, seed=data.seed, window=window)
    assert all(map(same, text, take(alone, len(text))))


def test_text_goes_on_with_the_next_epoch(make):
    """In another order, as it does for a run on text alone."""
    data = make(text_share=0.5)
    rows = data.rows(data.corpora)
    epoch = len(PackedLoader(rows, BATCH, seed=data.seed))
    text = take(loader_of(data), 4 * epoch)[1::2]
    seen = [[row for batch in text[begin : begin + epoch] for row in batch["row_ids"].tolist()] for begin in (0, epoch)]
    assert seen[0] != seen[1] and all(len(set(rows)) == len(rows) == BATCH * epoch for rows in seen)
    alone = PackedLoader(rows, BATCH, seed=data.seed)
    assert all(map(same, text, [*alone, *alone]))


def test_names_are_hidden_as_passkeys_are(folders, tokenizer):
    """Another task in the same batches, and validation on all of its kinds."""
    task = RetrievalTask(keys=4, questions=4)
    data = RetrievalDataModule("kvtrain:tiny", *folders, task=task, sequence_length=LONGEST, batch_size=BATCH)
    batches = [*take(loader_of(data), 20), *loader_of(data, validation_rows=8)]
    expected = RetrievalTask(keys=4, questions=4).writer(tokenizer)
    rng = np.random.default_rng([data.seed, 3, 1])
    rng.random()
    haystack = loader_of(data)._haystack(rng, LONGEST)
    assert np.array_equal(batches[3]["input_ids"][1], expected.sample(rng, haystack, LONGEST).input_ids)
    answers = [tokenizer.decode(row[row >= 0]) for batch in batches for row in batch["labels"]]
    assert all(answers) and any(" means" in answer for answer in answers)


def test_samples_too_short_for_a_passkey_are_runs(make):
    loader = loader_of(make(sequence_length=128, shortest=16, copy_share=0.01))
    shapes = {True: set(), False: set()}
    for batch in take(loader, 200):
        for row in batch["input_ids"].tolist():
            shapes[is_passkey(row)].add(len(row))
    assert min(shapes[False]) == 16 and min(shapes[True]) in (80, 96)


# Places.


@PROPERTY
@given(
    taken=st.integers(0, 400),
    window=st.integers(1, 3),
    world_size=st.integers(1, 3),
    growth=st.sampled_from([0, 7]),
    copy_share=st.sampled_from([0.0, 0.5]),
    text_share=st.sampled_from([0.0, 0.5]),
)
def test_resuming_anywhere(make, taken, window, world_size, growth, copy_share, text_share):
    """The batches after an interruption are those of a run without one, to the bit."""
    mixed = {"growth_batches": growth, "copy_share": copy_share, "text_share": text_share, "seed": taken}
    data = make(shortest=96, **mixed)
    place = {"window": window, "world_size": world_size, "rank": world_size - 1}
    straight = loader_of(data, **place)
    straight.load_state_dict({"cursor": max(0, taken - 3)})
    expected = take(straight, 6)[min(3, taken) :]
    first = loader_of(data, **place)
    first.load_state_dict({"cursor": max(0, taken - 1)})
    take(first, min(1, taken))
    assert first.state_dict()["cursor"] == taken
    resumed = loader_of(make(shortest=96, **mixed), **place)
    resumed.load_state_dict(first.state_dict())
    torch.manual_seed(taken)
    found = take(resumed, 3)
    assert all(map(same, found, expected))
    assert resumed.state_dict()["cursor"] == taken + 3


@PROPERTY
@given(window=st.integers(1, 4), world_size=st.integers(1, 3), copy_share=st.sampled_from([0.0, 0.4]))
def test_windows_count_their_targets_over_all_ranks(make, window, world_size, copy_share):
    """As the loss does: a row's first token is no target."""
    data = make(shortest=96, copy_share=copy_share)
    everyone = [
        take(loader_of(data, window=window, rank=rank, world_size=world_size), 2 * window) for rank in range(world_size)
    ]
    for start in (0, window):
        together = [batch for batches in everyone for batch in batches[start : start + window]]
        targets = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in together)
        assert {int(batch["num_items"]) for batch in together} == {targets}


def test_a_window_is_counted_from_any_place(make):
    """A run that goes on in the middle of an accumulation counts all of it."""
    data = make(shortest=96)
    expected = [int(batch["num_items"]) for batch in take(loader_of(data, window=4), 8)]
    assert len(set(expected[:4])) == len(set(expected[4:])) == 1 and expected[0] != expected[4]
    for cursor in range(8):
        loader = loader_of(data, window=4)
        loader.load_state_dict({"cursor": cursor})
        assert int(take(loader, 1)[0]["num_items"]) == expected[cursor]


def test_ranks_and_batches_have_rows_of_their_own(make):
    data = make(shortest=96, copy_share=0.2)
    everyone = [take(loader_of(data, rank=rank, world_size=3), 30) for rank in range(3)]
    lengths = [[batch["input_ids"].shape for batch in batches] for batches in everyone]
    assert lengths[0] == lengths[1] == lengths[2]  # a step waits for its longest rank
    rows = [row for batches in everyone for row in rows_of(batches)]
    assert len(set(rows)) == len(rows)
    ids = [row for batches in everyone for batch in batches for row in batch["row_ids"].tolist()]
    assert len(set(ids)) == len(ids) == len(rows)


def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(make):
    """Four rows a step as 1 x 4 or 2 x 2: the same ones, under the same ids."""
    alone = take(loader_of(make(batch_size=4)), 3)
    pair = [take(loader_of(make(batch_size=2), rank=rank, world_size=2), 3) for rank in (0, 1)]
    for together, *parts in zip(alone, *pair, strict=True):
        for name in ("input_ids", "labels", "row_ids", "num_items"):
            found = parts[0][name] if name == "num_items" else torch.cat([part[name] for part in parts])
            assert torch.equal(found, together[name])


def test_seeds_give_other_rows(make):
    rows = [rows_of(take(loader_of(make(seed=seed)), 4)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] and not set(rows[0]) & set(rows[2])


def test_a_loader_draws_nothing_from_the_global_generators(make):
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    take(loader_of(make(shortest=96, copy_share=0.5)), 5)
    take(loader_of(make(), validation_rows=3), 5)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# Validation.


@pytest.mark.parametrize("rows", [1, 6, 7])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_rows_are_served_once_and_every_time_the_same(make, rows, world_size):
    """Passkeys of full length, whatever trains; ranks that have run out of rows learn nothing from what they get."""
    expected = take(loader_of(make(batch_size=rows), validation_rows=rows), 2)
    assert len(expected) == 1 and expected[0]["input_ids"].shape == (rows, LONGEST)
    trains = {"seed": 9, "shortest": 16, "growth_batches": 5, "copy_share": 1.0}
    loaders = [
        loader_of(make(**trains), rank=rank, world_size=world_size, validation_rows=rows) for rank in range(world_size)
    ]
    for _ in range(2):
        everyone = [list(loader) for loader in loaders]
        steps = -(-rows // (BATCH * world_size))
        assert [len(batches) for batches in everyone] == [steps] * world_size
        served = {}
        for batch in (batch for batches in everyone for batch in batches):
            assert batch["input_ids"].shape[1] == LONGEST and len(batch["row_ids"]) == len(batch["input_ids"])
            for number, ids, labels in zip(batch["row_ids"].tolist(), *columns(batch), strict=True):
                if (labels != IGNORE_INDEX).any():
                    assert number not in served
                    served[number] = (ids, labels)
                else:
                    assert number >= rows
        assert sorted(served) == list(range(rows)) == expected[0]["row_ids"].tolist()
        for number, (ids, labels) in served.items():
            assert torch.equal(ids, expected[0]["input_ids"][number])
            assert torch.equal(labels, expected[0]["labels"][number])
            assert is_passkey(ids.tolist()) and ids.max() >= HELDOUT[0]


def test_the_data_module_asks_its_trainer(make):
    data = make(batch_size=3, validation_rows=5)
    data.prepare_data()
    assert data.val_dataloader().validation_rows == 5 and data.val_dataloader().world_size == 1
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=4, global_rank=1, world_size=2, distributed_sampler_kwargs=None
    )
    train, val = data.train_dataloader(), data.val_dataloader()
    assert (train.window, train.rank, train.world_size, train.validation_rows) == (4, 1, 2, None)
    assert (val.rank, val.world_size, val.validation_rows) == (1, 2, 5)
    text, heldout = (max(max(row) for row in rows_of(take(loader, 2))) for loader in (train, val))
    assert text in TEXT and heldout in HELDOUT
    default = make()
    assert len(rows_of(list(default.val_dataloader()))) == 64 == default.val_dataloader().validation_rows


# Refusals.


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"shortest": 8}, r"from 16 to sequence_length \(256\), not 8"),
        ({"shortest": 257}, r"from 16 to sequence_length \(256\), not 257"),
        ({"copy_share": -0.1}, "from 0 to 1, not -0.1"),
        ({"copy_share": 1.1}, "from 0 to 1, not 1.1"),
        ({"text_share": 1.0}, "from 0 to below 1, not 1.0"),
        ({"text_share": -0.5}, "from 0 to below 1, not -0.5"),
        ({"growth_batches": -1}, "must not be negative, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"validation_rows": 0}, "validation_rows must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, options, remedy):
    with pytest.raises(ValueError, match=remedy):
        make(**options)


@pytest.mark.parametrize("words", [1, 8])
def test_too_short_for_a_passkey_is_refused_before_the_training(make, words):
    """Whatever words will be drawn, and lengths are multiples of 16: what is not refused never fails."""
    refusals, fits = [], []
    for length in range(64, 180, 4):
        try:
            loader = loader_of(make(sequence_length=length, task=PasskeyTask(passkeys=1, words=words)))
        except ValueError as refusal:
            refusals.append(str(refusal))
        else:
            assert len(take(loader, 60)) == 60
            fits.append(length)
    assert fits == list(range(fits[0], 180, 4)) and 80 <= fits[0] <= 160
    assert all("lower words, or raise the length" in refusal for refusal in refusals)


def test_a_place_in_another_haystack_is_refused(make):
    state = loader_of(make(seed=7)).state_dict()
    with pytest.raises(ValueError, match=r"seed was 7, is 8.*strict_resume false"):
        loader_of(make(seed=8)).load_state_dict(state)
    data = make(seed=7)
    assert state["data"]["corpus"] == data.shards(data.corpora).manifest.fingerprint
