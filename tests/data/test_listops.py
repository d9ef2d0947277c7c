"""ListOps: values by an evaluator of the tests' own, what is drawn, and a loader whose place is a number."""

import statistics
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.listops import (
    NUM_CLASSES,
    VOCABULARY,
    ListOpsDataModule,
    ListOpsLoader,
    ListOpsTask,
    decode,
    encode,
    evaluate,
)
from kvtrain.data.packing import IGNORE_INDEX

PROPERTY = settings(max_examples=25)
SMALL = ListOpsTask(max_depth=5, max_arguments=5, shortest=10, longest=60)
PAPER = "[MAX 4 3 [MIN 2 3 ] 1 0 [MEDIAN 1 5 8 9 2 ] ]"


def loader_of(task=SMALL, batch_size=3, **options):
    return ListOpsLoader(task, batch_size, **options)


def take(loader, count):
    return list(islice(loader, count))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def expressions(batches):
    return [decode(row) for batch in batches for row in batch["input_ids"].tolist()]


def drawn(task, count, seed=0):
    return [task.sample(np.random.default_rng([seed, number])) for number in range(count)]


def tree(words):
    """A nested list of an expression's words, consumed from the front."""
    word = words.pop(0)
    if word[0] != "[":
        return int(word)
    branch = [word]
    while words[0] != "]":
        branch.append(tree(words))
    words.pop(0)
    return branch


def value_of(branch):
    """By recursion, and with the standard library's median."""
    if isinstance(branch, int):
        return branch
    values = [value_of(part) for part in branch[1:]]
    match branch[0]:
        case "[MIN":
            return min(values)
        case "[MAX":
            return max(values)
        case "[MED":
            return int(statistics.median(values))
        case _:
            return sum(values) % 10


def parsed(text):
    words = text.split()
    branch = tree(words)
    assert words == []
    return branch


def depth_of(branch):
    return 1 if isinstance(branch, int) else 1 + max(map(depth_of, branch[1:]))


def lists_of(branch):
    return [] if isinstance(branch, int) else [branch, *(found for part in branch[1:] for found in lists_of(part))]


# Expressions and their values.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (PAPER, 5),
        ("7", 7),
        ("[MIN 5 3 9 ]", 3),
        ("[MAX 5 3 9 ]", 9),
        ("[MED 9 1 5 ]", 5),
        ("[MED 1 2 3 9 ]", 2),
        ("[MED 4 3 ]", 3),
        ("[SM 9 8 7 ]", 4),
        ("[SM 5 5 ]", 0),
        ("[SM[MAX 1 2][MIN 3 4]]", 5),
        ("( ( ( [MAX 4 ) 3 ) ] )", 4),
    ],
)
def test_values_of_known_expressions(text, value):
    assert evaluate(encode(text)) == value
    assert evaluate([*encode(text), 0, 0]) == value


def test_encoding_and_decoding():
    ids = encode(PAPER)
    assert decode(ids) == PAPER.replace("MEDIAN", "MED")
    assert encode(decode(ids)) == ids and len(ids) == len(PAPER.split())
    assert decode([*ids, 0, 0, 0]) == decode(torch.tensor(ids)) == decode(ids)
    assert [encode(token) for token in VOCABULARY[1:]] == [[number] for number in range(1, len(VOCABULARY))]
    assert len(VOCABULARY) == 16 and VOCABULARY[0] == "<pad>"


@pytest.mark.parametrize("task", [SMALL, ListOpsTask(2, 10, 4, 12), ListOpsTask(10, 10, 300, 900)])
def test_the_writers_value_is_the_expressions(task):
    """Kept while an expression is drawn, against two evaluators of the finished tokens."""
    for ids, value in drawn(task, 200):
        assert value_of(parsed(decode(ids))) == value == evaluate(ids)


@pytest.mark.parametrize(
    "task", [SMALL, ListOpsTask(2, 10, 4, 12), ListOpsTask(3, 4, 5, 9), ListOpsTask(10, 10, 300, 900)]
)
def test_expressions_keep_to_their_limits(task):
    samples = drawn(task, 400)
    lengths = [len(ids) for ids, _ in samples]
    trees = [parsed(decode(ids)) for ids, _ in samples]
    sizes = Counter(len(branch) - 1 for branch in trees for branch in lists_of(branch))
    assert task.shortest <= min(lengths) and max(lengths) <= task.longest
    assert max(map(depth_of, trees)) <= task.max_depth
    assert min(sizes) >= 2 and max(sizes) <= task.max_arguments


def test_every_limit_is_reached():
    samples = drawn(ListOpsTask(max_depth=3, max_arguments=3, shortest=4, longest=17), 3000)
    trees = [parsed(decode(ids)) for ids, _ in samples]
    assert {len(ids) for ids, _ in samples} == set(range(4, 18)) - {6}  # two lists have at least 7
    assert {depth_of(branch) for branch in trees} == {2, 3}
    assert {len(branch) - 1 for branch in trees for branch in lists_of(branch)} == {2, 3}


def test_shares_are_those_of_the_published_generator():
    """Nothing is drawn again here: two levels below the root, 2 to 4 arguments, a quarter of them lists."""
    trees = [parsed(decode(ids)) for ids, _ in drawn(ListOpsTask(3, 4, 4, 26), 8000)]
    arguments = [part for branch in trees for part in branch[1:]]
    lists = [part for part in arguments if not isinstance(part, int)]
    assert abs(len(lists) / len(arguments) - 0.25) < 0.01
    for counts, kinds in (
        (Counter(len(branch) - 1 for branch in trees), 3),
        (Counter(branch[0] for branch in [*trees, *lists]), 4),
        (Counter(part for part in arguments if isinstance(part, int)), 10),
    ):
        total = sum(counts.values())
        assert len(counts) == kinds
        assert max(abs(count / total - 1 / kinds) for count in counts.values()) < 0.02


def test_classes_are_balanced():
    """Every value, none in more than a fifth of the samples: what a guesser reaches."""
    counts = Counter(value for _, value in drawn(ListOpsTask(), 1500))
    assert set(counts) == set(range(NUM_CLASSES))
    assert max(counts.values()) < 0.2 * 1500 and min(counts.values()) > 0.05 * 1500


# Batches.


@pytest.mark.parametrize("validation_rows", [None, 12])
def test_a_batch_is_padded_on_the_right(validation_rows):
    widths = set()
    for batch in take(loader_of(validation_rows=validation_rows), 4):
        ids, mask = batch["input_ids"], batch["document_ids"]
        lengths = mask.sum(1)
        assert ids.shape == mask.shape == (3, -(-int(lengths.max()) // 16) * 16)
        assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
        assert torch.equal(mask == 0, ids == 0)
        assert batch["labels"].tolist() == [evaluate(row) for row in ids.tolist()]
        assert batch["row_ids"].shape == (3,) and {tensor.dtype for tensor in batch.values()} == {torch.long}
        assert ("num_items" in batch) == (validation_rows is None)
        widths.add(ids.shape[1])
    assert len(widths) > 1


@PROPERTY
@given(st.integers(0, 300), st.integers(1, 3), st.integers(1, 3))
def test_resuming_anywhere(taken, window, world_size):
    """Between windows and inside them, the batches are those of a run without an interruption."""
    place = {"seed": taken, "window": window, "rank": world_size - 1, "world_size": world_size}
    straight = loader_of(**place)
    straight.load_state_dict({"cursor": max(0, taken - 2)})
    expected = take(straight, 5)[min(2, taken) :]
    first = loader_of(**place)
    first.load_state_dict({"cursor": max(0, taken - 1)})
    take(first, min(1, taken))
    assert first.state_dict()["cursor"] == taken
    resumed = loader_of(**place)
    resumed.load_state_dict(first.state_dict())
    torch.manual_seed(taken)
    found = take(resumed, 3)
    assert all(map(same, found, expected)) and len(found) == 3
    assert resumed.state_dict()["cursor"] == taken + 3


def test_a_run_is_one_stream_from_its_first_batch():
    assert all(map(same, take(loader_of(), 6), take(loader_of(), 6)))
    loader = loader_of()
    parts = [take(loader, 2), take(loader, 4)]
    assert all(map(same, [*parts[0], *parts[1]], take(loader_of(), 6)))


@pytest.mark.parametrize(("window", "world_size"), [(1, 1), (4, 1), (3, 2)])
def test_windows_count_their_labels_over_all_ranks(window, world_size):
    everyone = [take(loader_of(window=window, rank=rank, world_size=world_size), window) for rank in range(world_size)]
    together = [batch for batches in everyone for batch in batches]
    labels = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in together)
    assert {int(batch["num_items"]) for batch in together} == {labels} == {3 * window * world_size}


def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks():
    """Four rows a step as 1 x 4 or 2 x 2: the same ones, under the same ids."""
    alone = take(loader_of(batch_size=4), 3)
    pair = [take(loader_of(batch_size=2, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for together, *parts in zip(alone, *pair, strict=True):
        assert expressions([together]) == expressions(parts)
        for name in ("labels", "row_ids"):
            assert torch.equal(torch.cat([part[name] for part in parts]), together[name])
        assert {int(part["num_items"]) for part in parts} == {int(together["num_items"])}


def test_no_two_rows_are_the_same():
    """Of one run over ranks and batches, of other seeds, and held out, whatever the seed."""
    task = ListOpsTask(6, 6, 40, 200)
    runs = [take(loader_of(task, seed=seed, rank=rank, world_size=2), 20) for seed in (0, 1) for rank in (0, 1)]
    held_out = list(loader_of(task, validation_rows=60))
    rows = [row for batches in [*runs, held_out] for row in expressions(batches)]
    assert len(rows) == len(set(rows)) == 4 * 60 + 60
    ids = [number for batches in runs[:2] for batch in batches for number in batch["row_ids"].tolist()]
    assert len(ids) == len(set(ids))


def test_a_loader_draws_nothing_from_the_global_generators():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    take(loader_of(), 3)
    take(loader_of(validation_rows=3), 1)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("rows", [1, 6, 7])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_rows_are_served_once_and_every_time_the_same(rows, world_size):
    """Whatever trains; a rank that has run out of rows gets one without a label, and as many batches as the others."""
    whole = next(iter(loader_of(batch_size=rows, validation_rows=rows)))
    expected = list(zip(expressions([whole]), whole["labels"].tolist(), strict=True))
    loaders = [
        loader_of(seed=9, batch_size=2, rank=rank, world_size=world_size, validation_rows=rows)
        for rank in range(world_size)
    ]
    for _ in range(2):
        next(iter(loaders[0]))  # broken off; the next one is whole
        everyone = [list(loader) for loader in loaders]
        assert {len(batches) for batches in everyone} == {-(-rows // (2 * world_size))} == {len(loaders[0])}
        served, idle = {}, []
        for batch in (batch for batches in everyone for batch in batches):
            assert batch["document_ids"].any(1).all()
            rows_of = zip(batch["row_ids"].tolist(), expressions([batch]), batch["labels"].tolist(), strict=True)
            for number, text, label in rows_of:
                if label == IGNORE_INDEX:
                    idle.append(number)
                else:
                    assert number not in served
                    served[number] = (text, label)
        assert [served[number] for number in range(rows)] == expected and len(served) == rows
        assert all(number >= rows for number in idle)


# The data module.


def test_the_data_module_asks_its_trainer():
    data = ListOpsDataModule(5, 5, 10, 60, batch_size=3, validation_rows=5, seed=7)
    assert (data.tokenizer_name, data.sequence_length, data.num_classes) == (None, 60, 10)
    assert data.vocabulary == VOCABULARY and data.val_dataloader().world_size == 1
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=4, global_rank=1, world_size=2, distributed_sampler_kwargs=None
    )
    train, val = data.train_dataloader(), data.val_dataloader()
    place = {"rank": 1, "world_size": 2}
    assert all(map(same, take(train, 3), take(loader_of(seed=7, window=4, **place), 3)))
    assert all(map(same, list(val), list(loader_of(validation_rows=5, **place)))) and len(val) == 1
    assert ListOpsDataModule().task == ListOpsTask(10, 10, 500, 2000)


class Recorder(pl.LightningModule):
    """Learns nothing, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, index):
        self.seen.append(batch["row_ids"].tolist())
        return self.weight * 0.0

    def validation_step(self, batch, index):
        self.validated.append(batch["labels"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_lightning_goes_on_where_it_stopped(tmp_path):
    """Through the real trainer, with accumulation, from a checkpoint after any step."""

    def fit(steps, resume=None, save=None):
        module = Recorder()
        options = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
        )
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", accumulate_grad_batches=2, val_check_interval=4, **options
        )
        trainer.fit(module, datamodule=ListOpsDataModule(5, 5, 10, 60, 3, validation_rows=5), ckpt_path=resume)
        if save:
            trainer.save_checkpoint(save)
        return module

    straight = fit(6)
    assert straight.seen == [batch["row_ids"].tolist() for batch in take(loader_of(), 12)]
    held_out = [batch["labels"].tolist() for batch in loader_of(validation_rows=5)]
    assert straight.validated[-2:] == held_out
    for stop in (1, 4):
        before = fit(stop, save=tmp_path / "a.ckpt")
        assert before.seen + fit(6, resume=tmp_path / "a.ckpt").seen == straight.seen


# Refusals.


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"max_depth": 1}, "max_depth must be at least 2, not 1"),
        ({"max_arguments": 1}, "max_arguments must be at least 2, not 1"),
        ({"shortest": 3}, "shortest must be at least 4, not 3"),
        ({"shortest": 100, "longest": 99}, r"longest must be at least 100 \(shortest\), not 99"),
        ({"max_depth": 3, "max_arguments": 4}, r"none has from 500 to 2000 tokens; widen the range, or change depth"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"validation_rows": 0}, "validation_rows must be at least 1, not 0"),
        ({"seed": -1}, "data.seed must be from 0 to 9223372036854775807, not -1"),
    ],
)
def test_settings_out_of_range_are_refused(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        ListOpsDataModule(**options)


@pytest.mark.parametrize("text", ["[MAX 1 2", "1 2", "", "]", "[MAX ]", "[MAX 1 ] ]", "[MIN 1 ] 2", "[SM [MAX 1 2 ]"])
def test_what_is_not_one_expression_has_no_value(text):
    with pytest.raises(ValueError, match="give one complete expression"):
        evaluate(encode(text))


def test_foreign_words_and_ids_are_refused():
    with pytest.raises(ValueError, match=r"'\[MEAN' is not ListOps; write it with 0 1 2 .* \[SM \]"):
        encode("[MEAN 1 2 ]")
    with pytest.raises(ValueError, match="'10' is not ListOps"):
        encode("[MAX 10 2 ]")
    with pytest.raises(ValueError, match="id 16 is not ListOps; ids are from 0 to 15"):
        decode([1, 16])
    with pytest.raises(ValueError, match="id -1 is not ListOps"):
        decode([-1])


def test_a_place_among_other_expressions_is_refused():
    state = loader_of(seed=7).state_dict() | {"cursor": 5}
    with pytest.raises(ValueError, match=r"seed was 7, is 8.*strict_resume false"):
        loader_of(seed=8).load_state_dict(state)
    loader = loader_of(seed=8, strict_resume=False)
    loader.load_state_dict(state)
    assert loader.cursor == 5
