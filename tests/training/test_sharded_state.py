"""What a sharded checkpoint holds of weights and optimizer, and which model takes it; one process is enough."""

import pytest
import torch
from torch import nn

from kvtrain.errors import UsageError
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
