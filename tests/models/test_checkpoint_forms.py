"""Checkpoints in pieces: every tensor is read whole, and nothing that they hold is run."""

import json

import pytest
import torch

from kvtrain.models.checkpoint import open_checkpoint
from kvtrain.models.config import CHECKPOINT_KEY
from kvtrain.models.sharded import INDEX, REST, ShardedReader
from kvtrain.models.zero import ZeROCheckpoint, read_shard
from kvtrain.run_folder import step_path
from kvtrain.training.resume import find_checkpoint
from kvtrain.training.strategies import DEEPSPEED_INSTALLED
from tests.sharded_checkpoints import write_sharded, write_zero

SETTINGS = json.dumps({"config": {}, "tokenizer": None})
NEEDS_DEEPSPEED = pytest.mark.skipif(not DEEPSPEED_INSTALLED, reason="needs DeepSpeed: pip install kvtrain[deepspeed]")


@pytest.fixture
def state():
    """Shapes that no number of ranks divides."""
    shapes = {"a": (5, 3), "b": (7,), "c": (1,), "d": (4, 2, 3), "e": (11,)}
    return {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}


class Bomb:
    """Opens a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def assert_holds(checkpoint, state):
    stored = open_checkpoint(checkpoint)
    assert stored.settings["tokenizer"] is None
    assert set(stored.weights) == {name.removeprefix("model.") for name in state}
    for name, weight in stored.weights.items():
        assert torch.equal(weight, state[f"model.{name}"]), name


def test_shards_of_torch(tmp_path, state):
    write_sharded(tmp_path / "ckpt", state, **{CHECKPOINT_KEY: SETTINGS})
    assert_holds(tmp_path / "ckpt", state)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_shards_of_zero(tmp_path, state, stage, ranks, frozen):
    write_zero(tmp_path / "ckpt", state, stage, ranks, frozen, **{CHECKPOINT_KEY: SETTINGS})
    checkpoint = ZeROCheckpoint(tmp_path / "ckpt")
    assert (checkpoint.stage, checkpoint.ranks) == (stage, ranks)
    assert checkpoint.trained == list(state)[frozen:]
    assert_holds(tmp_path / "ckpt", state)


@NEEDS_DEEPSPEED
def test_of_a_run_on_a_base_what_was_learnt_is_read(tmp_path, state):
    settings = json.dumps({"config": {}, "tokenizer": None, "base": "kvtrain:tiny"})
    write_zero(tmp_path / "ckpt", state, 3, 2, 3, **{CHECKPOINT_KEY: settings})
    assert set(open_checkpoint(tmp_path / "ckpt").weights) == {"d", "e"}


def test_a_planted_index_is_not_run(tmp_path, state):
    write_sharded(tmp_path / "ckpt", state, **{CHECKPOINT_KEY: SETTINGS})
    import pickle

    (tmp_path / "ckpt" / INDEX).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"it names io\.open, which no checkpoint needs"):
        ShardedReader(tmp_path / "ckpt")
    assert not (tmp_path / "exploded").exists()


def test_what_is_planted_beside_the_tensors_is_not_run(tmp_path, state):
    write_sharded(tmp_path / "ckpt", state)
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, tmp_path / "ckpt" / REST)
    with pytest.raises(ValueError, match="not readable"):
        open_checkpoint(tmp_path / "ckpt")
    assert not (tmp_path / "exploded").exists()


@NEEDS_DEEPSPEED
def test_a_planted_shard_is_not_run(tmp_path):
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, tmp_path / "shard.pt")
    with pytest.raises(ValueError, match=r"it names io\.open, which no checkpoint of kvtrain needs") as refusal:
        read_shard(tmp_path / "shard.pt")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("left", [-1, 0, None])
def test_a_cut_or_missing_shard_is_said(tmp_path, state, left):
    write_sharded(tmp_path / "ckpt", state)
    shard = tmp_path / "ckpt" / "__0_0.distcp"
    size, content = shard.stat().st_size, shard.read_bytes()[:left]
    shard.unlink()
    if left is not None:
        shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: damaged, \d+ bytes of \d+ are there$") as refusal:
        ShardedReader(tmp_path / "ckpt")
    there = 0 if left is None else len(content)
    assert str(refusal.value).endswith(f"{there} bytes of {size} are there")


@pytest.mark.parametrize("name", ["__0_0.distcp", REST, INDEX])
def test_without_a_manifest_last_passes_over_a_folder_that_was_cut(tmp_path, state, name):
    first, second = (step_path(tmp_path, step) for step in (1, 2))
    for path in (first, second):
        write_sharded(path, state)
    assert find_checkpoint(tmp_path, "last") == (second, {})
    (second / name).write_bytes((second / name).read_bytes()[:-1])
    path, faults = find_checkpoint(tmp_path, "last")
    assert path == first and list(faults) == [second] and name in faults[second]
    with pytest.raises(ValueError, match=name):
        find_checkpoint(tmp_path, str(second))


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("stage", "name", "left"),
    [
        (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", -1),
        (2, "mp_rank_00_model_states.pt", -1),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", -1),
        (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", None),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", None),
    ],
)
def test_without_a_manifest_last_passes_over_deepspeed_s_folder_that_was_cut(tmp_path, state, stage, name, left):
    first, second = (step_path(tmp_path, step) for step in (1, 2))
    for path in (first, second):
        write_zero(path, state, stage, ranks=2, dp_world_size=2)
    assert find_checkpoint(tmp_path, "last") == (second, {})
    shard = second / "checkpoint" / name
    content = shard.read_bytes()[:left]
    shard.unlink()
    if left is not None:
        shard.write_bytes(content)
    path, faults = find_checkpoint(tmp_path, "last")
    assert path == first and list(faults) == [second]
    assert ("optimizer states of 1 ranks of 2" if left is None and stage == 2 else name) in faults[second]


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x04}."])
def test_a_damaged_index_is_said(tmp_path, state, content):
    write_sharded(tmp_path / "ckpt", state)
    (tmp_path / "ckpt" / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match="not the index of a sharded checkpoint"):
        open_checkpoint(tmp_path / "ckpt")
