"""The loader: its order, its place, its share for each rank, and the targets of its windows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrain.data.loader import PackedLoader
from kvtrain.data.packing import IGNORE_INDEX, PackedRows

PROPERTY = settings(max_examples=40)
LENGTH = 6


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedRows:
    """41 rows with different numbers of targets."""
    from kvtrain.data.shards import TokenShards

    from .conftest import fill

    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, rng.integers(1, 5)).tolist() for _ in range(45)]
    documents.append([1] * (41 * LENGTH - 2 - sum(map(len, documents))))
    fill(folder, documents, 1 << 20, 100)
    packed = PackedRows(TokenShards(folder), LENGTH)
    assert len(packed) == 41 and len(set(packed.num_targets.tolist())) > 3
    return packed


def ids(batches: Any) -> list[list[int]]:
    return [batch["row_ids"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_an_epoch_is_a_permutation_of_seed_and_epoch(rows: PackedRows):
    def epochs(seed: int, count: int = 3) -> list[list[int]]:
        loader = PackedLoader(rows, 1, seed=seed)
        return [flat(ids(loader)) for _ in range(count)]

    first = epochs(0)
    assert all(sorted(epoch) == list(range(41)) for epoch in first)
    assert len({tuple(epoch) for epoch in first + epochs(1)}) == 6
    assert epochs(0) == first
    np.random.default_rng(5).random()
    torch.manual_seed(99)
    assert epochs(0, 1) == first[:1]


def test_a_loader_draws_nothing_from_the_global_generators(rows: PackedRows):
    torch.manual_seed(3)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    list(PackedLoader(rows, 2, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 45))
def test_resuming_anywhere(rows: PackedRows, batch_size: int, window: int, world_size: int, taken: int):
    """The batches after the interruption are those of an uninterrupted run, over epochs, to the bit."""
    make = {"batch_size": batch_size, "seed": 1, "window": window, "rank": world_size - 1, "world_size": world_size}

    def run(loader: PackedLoader, count: int) -> list[dict[str, torch.Tensor]]:
        batches: list[dict[str, torch.Tensor]] = []
        while len(batches) < count:
            for batch in loader:
                batches.append(batch)
                if len(batches) == count:
                    break
        return batches

    straight = run(PackedLoader(rows, **make), taken + 30)
    first = PackedLoader(rows, **make)
    run(first, taken)
    resumed = PackedLoader(rows, **make)
    resumed.load_state_dict(first.state_dict())
    for found, expected in zip(run(resumed, 30), straight[taken:], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@PROPERTY
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_ranks_share_each_step_and_windows_count_their_targets(
    rows: PackedRows, batch_size: int, window: int, world_size: int
):
    loaders = [
        PackedLoader(rows, batch_size, seed=2, window=window, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    everyone = [list(loader) for loader in loaders]
    steps = 41 // (batch_size * window * world_size) * window
    assert [len(batches) for batches in everyone] == [len(loader) for loader in loaders] == [steps] * world_size
    served = [row for batches in everyone for batch in ids(batches) for row in batch]
    assert len(served) == len(set(served)) == steps * batch_size * world_size
    for start in range(0, steps, window):
        together = [batch for batches in everyone for batch in batches[start : start + window]]
        targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in together)
        assert {int(batch["num_items"]) for batch in together} == {targets}
        assert targets > 0


def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(rows: PackedRows):
    """Four rows a step as 4 x 1, 2 x 2 or with accumulation: the same rows meet in each optimizer step."""
    alone = [set(step) for step in ids(PackedLoader(rows, 4, seed=0))]
    pair = [ids(PackedLoader(rows, 2, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [set(a) | set(b) for a, b in zip(*pair, strict=True)] == alone
    accumulated = ids(PackedLoader(rows, 2, seed=0, window=2))
    assert [set(a) | set(b) for a, b in zip(accumulated[::2], accumulated[1::2], strict=True)] == alone


def test_resuming_with_other_ranks(rows: PackedRows):
    """The place is a number of rows: nothing is repeated or left out; inside a window it is refused."""
    before = PackedLoader(rows, 4, seed=0)
    stream = iter(before)
    seen = ids([next(stream) for _ in range(3)])
    after = PackedLoader(rows, 2, seed=0, window=2)
    after.load_state_dict(before.state_dict())
    assert sorted(flat(seen + ids(after))) == sorted(flat(ids(PackedLoader(rows, 4, seed=0))))
    with pytest.raises(
        ValueError, match=r"cannot resume 12 rows into the epoch with 10 rows per step; .* 4 rows per b"
    ):
        PackedLoader(rows, 5, seed=0, window=2).load_state_dict(before.state_dict())
    inside = PackedLoader(rows, 2, seed=0, window=2)
    inside.load_state_dict({"epoch": 0, "cursor": 3})
    data = {"corpus": rows.shards.manifest.fingerprint, "rows": 41, "sequence_length": LENGTH, "seed": 0}
    assert inside.state_dict() == {"epoch": 0, "cursor": 3, "rows_per_batch": 2, "data": data}


def test_a_place_in_other_data_is_refused_or_taken_with_a_warning(rows: PackedRows, write_shards: Any, caplog: Any):
    state = PackedLoader(rows, 2, seed=0).state_dict() | {"cursor": 3}
    other = PackedRows(write_shards([[1, 2, 3, 4]] * 30), LENGTH)
    changes = [
        (PackedLoader(rows, 2, seed=1), ["seed was 0, is 1"]),
        (PackedLoader(other, 2, seed=0), ["corpus was", "rows was 41, is"]),
        (PackedLoader(PackedRows(rows.shards, LENGTH + 1), 2, seed=0), [f"sequence_length was {LENGTH}, is"]),
    ]
    for loader, words in changes:
        with pytest.raises(ValueError, match="the data has changed since the checkpoint") as refusal:
            loader.load_state_dict(state)
        assert [word for word in words if word not in str(refusal.value)] == []
        assert str(refusal.value).endswith("--data.strict_resume false")
        assert loader.cursor == 0
        loader.strict_resume = False
        loader.load_state_dict(state)
        assert loader.cursor == 3
        assert words[0] in caplog.messages[-1]


def test_a_checkpoint_that_says_nothing_of_its_data_is_taken_with_a_warning(rows: PackedRows, caplog: Any):
    loader = PackedLoader(rows, 2, seed=0)
    loader.load_state_dict({"epoch": 1, "cursor": 3, "rows_per_batch": 2})
    assert (loader.epoch, loader.cursor) == (1, 3)
    assert "does not say what data it was trained on" in caplog.messages[-1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [None, 7, 1000])
def test_evaluation_serves_every_row_once(rows: PackedRows, world_size: int, limit: int | None):
    """In order, every rank for as many steps; ranks past the end get a row of padding, which has no target."""
    loaders = [
        PackedLoader(rows, 5, seed=None, rank=rank, world_size=world_size, limit=limit) for rank in range(world_size)
    ]
    batches = [list(loader) for loader in loaders]
    expected = min(limit or 41, 41)
    assert len({len(loader) for loader in loaders} | {len(b) for b in batches}) == 1
    shares = [batch for step in zip(*batches, strict=True) for batch in step]
    padding = [batch for batch in shares if batch["document_ids"].eq(0).all()]
    assert flat(ids(batch for batch in shares if batch["document_ids"].ne(0).any())) == list(range(expected))
    assert all(len(batch["row_ids"]) == 1 and batch["labels"].eq(IGNORE_INDEX).all() for batch in padding)
    assert bool(padding) == (len(loaders[0]) * 5 * world_size - expected >= 5)
    assert all("num_items" not in batch and batch["labels"].shape[1] == LENGTH for b in batches for batch in b)


def test_a_broken_off_evaluation_starts_again(rows: PackedRows):
    """Lightning looks at two batches before training; the next evaluation is whole."""
    loader = PackedLoader(rows, 5, seed=None)
    stream = iter(loader)
    next(stream), next(stream)
    assert ids(loader) == ids(loader) == ids(PackedLoader(rows, 5, seed=None))
    assert ids(loader)[0] == [0, 1, 2, 3, 4]


def test_a_corpus_smaller_than_a_step(rows: PackedRows):
    PackedLoader(rows, 41, seed=0)
    with pytest.raises(ValueError, match=r"packs into 41 rows, .* \(7 rows x 3 batches x 2 ranks\); lower batch_size"):
        PackedLoader(rows, 7, seed=0, window=3, world_size=2)


def test_lightning_takes_every_epoch_whole(rows: PackedRows, tmp_path: Any):
    """Three epochs through the real trainer, and the same rows after a stop inside and at the end of an epoch."""
    import lightning.pytorch as pl

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[list[int]] = []

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            self.seen.append(batch["row_ids"].tolist())
            return self.weight * 0.0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(steps: int, resume: Any = None, save: Any = None) -> list[list[int]]:
        module = Recorder()
        options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_progress_bar=False, **options)
        trainer.fit(module, PackedLoader(rows, 4, seed=0), ckpt_path=resume)
        if save:
            trainer.save_checkpoint(save)
        return module.seen

    straight = fit(25)
    loader = PackedLoader(rows, 4, seed=0)
    assert straight == (ids(loader) + ids(loader) + ids(loader))[:25]
    for stop in (7, 10, 20):
        before = fit(stop, save=tmp_path / "a.ckpt")
        assert before + fit(25, resume=tmp_path / "a.ckpt") == straight, stop


def test_the_fixture_writes_what_it_is_given(write_shards: Callable[..., Any]):
    assert write_shards([[1, 2], [3]]).tokens[0].tolist() == [1, 2, 3]
