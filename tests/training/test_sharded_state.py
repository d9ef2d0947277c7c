"""What a sharded checkpoint holds of weights and optimizer, and which model takes it; one process is enough."""

import resource
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from kvtrain.errors import UsageError
from kvtrain.models.sharded import ShardedReader
from kvtrain.training.strategies import DEEPSPEED_INSTALLED, DeepSpeedZeRO
from kvtrain.training.strategies.sharded_state import load_sharded, optimizer_state, save_sharded


def stepped(width: int = 3, steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a vector, a matrix and a number, after some steps."""
    model = nn.ParameterDict({"v": torch.ones(width), "m": torch.ones(4, width), "n": torch.tensor(2.0)})
    optimizer = torch.optim.AdamW([{"params": [model["m"]], "lr": 0.1}, {"params": [model["v"], model["n"]]}], lr=0.2)
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape) + step
        optimizer.step()
    return model, optimizer


def write(folder, model, optimizer):
    checkpoint = {"state_dict": dict(model.named_parameters()), "optimizer_states": [optimizer_state(model, optimizer)]}
    save_sharded({**checkpoint, "global_step": 7}, folder, first=True)


def read(folder, model, optimizers, strict=True):
    return load_sharded(folder, model, dict(model.named_parameters()), optimizers, strict)


def test_weights_moments_and_settings_come_back(tmp_path):
    model, optimizer = stepped(steps=3)
    optimizer.param_groups[0]["lr"] = 0.025
    write(tmp_path / "ckpt", model, optimizer)
    fresh, other = stepped()
    assert read(tmp_path / "ckpt", fresh, [other])["global_step"] == 7
    for name, parameter in model.named_parameters():
        found = dict(fresh.named_parameters())[name]
        assert torch.equal(found, parameter)
        assert other.state[found].keys() == optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(other.state[found][kind], value) for kind, value in optimizer.state[parameter].items())
    assert [group["lr"] for group in other.param_groups] == [0.025, 0.2]


def test_an_optimizer_that_was_cleared_stays_so(tmp_path):
    model, optimizer = stepped(steps=1)
    optimizer.state.clear()
    write(tmp_path / "ckpt", model, optimizer)
    fresh, other = stepped(steps=1)
    read(tmp_path / "ckpt", fresh, [other])
    assert not other.state


def test_another_model_is_refused(tmp_path):
    write(tmp_path / "ckpt", *stepped(steps=1))
    with pytest.raises(UsageError, match=r"of another model, m is \(4, 3\) there and \(4, 5\) here"):
        read(tmp_path / "ckpt", stepped(width=5)[0], [])
    fewer = nn.ParameterDict({"v": torch.ones(3)})
    with pytest.raises(UsageError, match=r"is \(4, 3\) there and absent here|is \(\) there and absent here"):
        read(tmp_path / "ckpt", fewer, [])


def test_what_a_run_left_alone_may_be_absent(tmp_path):
    model, _ = stepped(steps=2)
    state = {"state_dict": {"v": model["v"]}, "optimizer_states": []}
    save_sharded(state, tmp_path / "ckpt", first=True)
    fresh, _ = stepped()
    read(tmp_path / "ckpt", fresh, [], strict=False)
    assert torch.equal(fresh["v"], model["v"]) and not torch.equal(fresh["m"], model["m"])
    with pytest.raises(UsageError, match=r"absent there and"):
        read(tmp_path / "ckpt", fresh, [])


@pytest.fixture
def room():
    """Bounds the size of files; without a bound it lifts it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int = before[0]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    limit()


@pytest.mark.parametrize(("size", "name"), [(100_000, ""), (100, "/meta.pt")])
def test_a_disk_without_room_is_the_systems_error_and_names_the_place(tmp_path, room, size, name):
    state = {"state_dict": {"w": torch.randn(300, 300)}, "optimizer_states": []}
    room(size)
    with pytest.raises(OSError, match="File too large") as refusal:
        save_sharded(state, tmp_path / "ckpt", first=True)
    room()
    assert refusal.value.filename == f"{tmp_path}/ckpt{name}"
    if not name:  # ranks pickle their errors: the system's has to be the one that they tell
        assert type(refusal.value.__cause__.failures[0][0]) is OSError


@pytest.mark.parametrize("stop", [KeyboardInterrupt("by hand"), SystemExit(143)])
def test_a_wish_to_stop_ends_a_save_as_it_is(tmp_path, monkeypatch, stop):
    def write(*arguments):
        try:
            raise stop
        finally:
            raise RuntimeError("unexpected pos")

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    with pytest.raises(type(stop)) as ended:
        write_weights(tmp_path / "ckpt")
    assert ended.value is stop


def test_another_failure_of_a_save_is_an_exception_in_one_line(tmp_path, monkeypatch):
    def write(*arguments):
        raise TypeError("no\ntensor")

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    with pytest.raises(RuntimeError) as refusal:
        write_weights(tmp_path / "ckpt")
    assert str(refusal.value) == f"{tmp_path}/ckpt: no"


def test_a_damaged_shard_is_a_mistake_in_one_line(tmp_path):
    write_weights(tmp_path / "ckpt")
    reader, shard = ShardedReader(tmp_path / "ckpt"), tmp_path / "ckpt" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="is damaged") as refusal:
        reader.read("state_dict.w")
    assert str(refusal.value) == f"{shard}: state_dict.w is damaged (Weights only load failed)"
    with pytest.raises(ValueError, match=r"Weights only load failed$") as refusal:
        reader.read_into({"state_dict.w": torch.zeros(3, 3)})
    assert str(refusal.value).startswith(f"{tmp_path}/ckpt: ") and "\n" not in str(refusal.value)


def write_weights(folder):
    save_sharded({"state_dict": {"w": torch.randn(3, 3)}, "optimizer_states": []}, folder, first=True)


@pytest.mark.skipif(not DEEPSPEED_INSTALLED, reason="needs DeepSpeed: pip install kvtrain[deepspeed]")
@pytest.mark.parametrize("size", [100_000, 100])
def test_deepspeed_names_the_place_without_room(tmp_path, room, size):
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Engine:
        checkpoint_engine = TorchCheckpointEngine(SimpleNamespace(checkpoint_config={"checkpoint_serialization": True}))

        def save_checkpoint(self, folder, client_state, **settings):
            self.checkpoint_engine.save({"w": torch.randn(300, 300), **client_state}, f"{folder}/shard.pt")

    strategy = DeepSpeedZeRO({"zero_optimization": {"stage": 2}})
    strategy._model = Engine()
    strategy.save_checkpoint({"global_step": 7}, tmp_path)
    assert torch.load(tmp_path / "shard.pt")["global_step"] == 7
    room(size)
    with pytest.raises(OSError, match="File too large") as refusal:
        strategy.save_checkpoint({"global_step": 8}, tmp_path)
    room()
    assert refusal.value.filename == f"{tmp_path}/shard.pt"
