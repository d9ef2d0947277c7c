"""What a phase boundary does to plain and sharded parameters, and to optimizers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kvtrain.training.parameters import clamp_parameter, clear_moments, whole, zero_rows
from kvtrain.training.strategies.zero_parameters import local_part

ROWS = slice(3, None, 4)


@pytest.fixture
def mesh():
    """One process that shards with itself."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(8, 5), (8,)])
def test_only_the_rows_change(shape):
    parameter = nn.Parameter(torch.randn(shape))
    before = parameter.detach().clone()
    zero_rows(parameter, ROWS)
    assert (parameter[ROWS] == 0).all()
    kept = [row for row in range(8) if row % 4 != 3]
    assert torch.equal(parameter[kept], before[kept])
    assert parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_rows_of_a_sharded_matrix(mesh, placement):
    whole = torch.randn(8, 5)
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
    zero_rows(parameter, ROWS)
    whole[ROWS] = 0
    assert torch.equal(parameter.full_tensor(), whole)


def test_every_number_is_clipped():
    parameter = nn.Parameter(torch.tensor([-0.5, 0.25, 1.5]))
    clamp_parameter(parameter, 0.0, 1.0)
    assert parameter.tolist() == [0.0, 0.25, 1.0]
    assert parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_every_number_of_a_sharded_vector_is_clipped_and_gathered(mesh, placement):
    parameter = nn.Parameter(distribute_tensor(torch.tensor([-0.5, 0.25, 1.5]), mesh, [placement]))
    clamp_parameter(parameter, 0.0, 1.0)
    found = whole(parameter)
    assert type(found) is torch.Tensor and found.tolist() == [0.0, 0.25, 1.0] and not found.requires_grad


def test_parts_of_a_vector_that_ranks_do_not_divide_evenly(monkeypatch):
    """Ten numbers on four ranks: three each, the last rank's part padded."""
    parts = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(local_part(torch.arange(10).view(5, 2), 3).tolist())
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 0]]


def stepped() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter that AdamW has moved twice."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5, 3.0])
        optimizer.step()
    return parameter, optimizer


def next_step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    parameter.grad = torch.tensor([-1.0, 1.0, 2.0, 0.25])
    optimizer.step()
    return parameter.detach().clone()


@pytest.mark.parametrize("partitioned", [False, True])
def test_cleared_moments_step_like_a_new_optimizer(partitioned):
    parameter, optimizer = stepped()
    fresh = nn.Parameter(parameter.detach().clone())
    expected = next_step(fresh, torch.optim.AdamW([fresh], lr=0.1))
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3
    holder = SimpleNamespace(optimizer=optimizer) if partitioned else optimizer
    clear_moments(SimpleNamespace(optimizers=[holder]))
    if partitioned:  # DeepSpeed holds views of the very tensors
        assert all((tensor == 0).all() for tensor in tensors)
    else:
        assert not optimizer.state
    assert torch.equal(next_step(parameter, optimizer), expected)


def test_moments_that_stay_step_elsewhere():
    parameter, optimizer = stepped()
    fresh = nn.Parameter(parameter.detach().clone())
    assert not torch.allclose(next_step(parameter, optimizer), next_step(fresh, torch.optim.AdamW([fresh], lr=0.1)))
